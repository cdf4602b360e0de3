"""
Microsoft's Phi-3-vision checkpoints, and fine-tunes of them, as phi3-embed; and back. It is `phi3-embed convert`.

    python convert_phi3_vision.py SOURCE OUTPUT [--dtype bfloat16] [--push-to-hub NAME]
    python convert_phi3_vision.py SOURCE OUTPUT --put-back MODEL
"""

from phi3_tools.checkpoint.command import main

if __name__ == "__main__":
    main()
