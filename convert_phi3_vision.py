"""
Microsoft's Phi-3-vision checkpoints, and fine-tunes of them, as phi3-embed; and back. It is `phi3-embed convert`.

    python convert_phi3_vision.py SOURCE OUTPUT [--dtype bfloat16] [--push-to-hub NAME]
    python convert_phi3_vision.py SOURCE OUTPUT --put-back MODEL
"""

import sys

from phi3_tools.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
