"""`python -m modernizer` is `modernize`."""

from modernizer.cli import main

main()
