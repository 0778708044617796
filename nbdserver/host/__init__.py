"""The real world behind the seams: time, threads, files and sockets of this host."""
