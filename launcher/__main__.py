"""`python -m launcher` is `maskwright`."""

from launcher.cli import main

main()
