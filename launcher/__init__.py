"""maskwright: how processes start, and the commands."""
