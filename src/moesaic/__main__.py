"""`python -m moesaic` is the `moesaic` command."""

from moesaic.cli.main import main

main()
