"""`python -m service`: the console command, where the script itself is not on the path."""

from service.cli import main

main()
