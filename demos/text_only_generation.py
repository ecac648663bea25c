"""Ask with or without a picture, recording or video; the answer is text, and no voice is loaded.

python demos/text_only_generation.py -p "Who are you?"
python demos/text_only_generation.py --video clip.mp4 -p "What happens?" -m Qwen/Qwen2.5-Omni-3B
"""

import argparse
import sys
from pathlib import Path

from lowvram import LowVRAMOmni, TextDelta

KINDS = ("image", "audio", "video")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="pocket", help="a folder, a hub id, or pocket")
    parser.add_argument("--max-memory", help="the most device memory to use, as in 8GiB")
    parser.add_argument("-p", "--prompt", help="a question (default: one about a picture)")
    for kind in KINDS:
        parser.add_argument(f"--{kind}", metavar="FILE")
    args = parser.parse_args()
    media = [{"type": kind, kind: found} for kind in KINDS if (found := vars(args)[kind])]
    if not (media or args.prompt):
        media = [{"type": "image", "image": Path(__file__).parent / "media/picture.png"}]
    if args.model == "pocket":
        print("The built-in model is untrained: its words are noise.", file=sys.stderr)
    text = {"type": "text", "text": args.prompt or "What do you notice?"}
    with LowVRAMOmni.from_pretrained(args.model, args.max_memory, speech=False) as omni:
        question = {"role": "user", "content": [*media, text]}
        for event in omni.stream([question], max_pixels=360 * 420):
            if isinstance(event, TextDelta):
                print(event.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
