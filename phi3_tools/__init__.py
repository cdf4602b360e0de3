"""The tools of phi3-embed; `phi3-embed --help` lists them."""
