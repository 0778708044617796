"""The node: its settings, its data directory, the control process and the data process it keeps alive."""
