"""`python -m nbdserver`: the program, without an installed script."""

from nbdserver.cli.main import main

main()
