"""`python -m phi3_tools` is `phi3-embed`."""

from phi3_tools.cli import main

main()
