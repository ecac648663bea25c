"""Ask about a picture, a recording or a video and read the answer; nothing of the voice is loaded.

python demos/text_only_generation.py
python demos/text_only_generation.py --video clip.mp4 -p "What happens?" -m Qwen/Qwen2.5-Omni-3B
"""

import argparse
import sys
from pathlib import Path

from lowvram import LowVRAMOmni, TextDelta

KINDS = ("image", "audio", "video")
PICTURE = Path(__file__).parent / "media" / "picture.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="pocket", help="a folder, a hub id, or pocket")
    parser.add_argument("--max-memory", help="the most device memory to use, as in 8GiB")
    parser.add_argument("-p", "--prompt", default="What do you notice?")
    for kind in KINDS:
        parser.add_argument(f"--{kind}", metavar="FILE")
    args = parser.parse_args()
    given = {kind: getattr(args, kind) for kind in KINDS if getattr(args, kind)}
    media = [{"type": k, k: place} for k, place in (given or {"image": str(PICTURE)}).items()]
    if args.model == "pocket":
        print("The built-in model is untrained: its words are noise.", file=sys.stderr)
    question = {"role": "user", "content": [*media, {"type": "text", "text": args.prompt}]}
    with LowVRAMOmni.from_pretrained(args.model, args.max_memory, speech=False) as omni:
        for event in omni.stream([question]):
            if isinstance(event, TextDelta):
                print(event.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
