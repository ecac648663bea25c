"""Find facts in a silent video, seen once a second: each question is answered in text.

python demos/video_information_extracting.py
python demos/video_information_extracting.py shop.mp4 -p "How many drinks are there?" -m FOLDER
"""

import argparse
import sys
from pathlib import Path

from lowvram import LowVRAMOmni

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
QUESTIONS = (
    "What colour is the ball in the video?",
    "How many times does the ball touch the ground?",
    "In which direction does the ball move?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", nargs="?", default=Path(__file__).parent / "media/clip.mp4")
    parser.add_argument("-m", "--model", default="pocket", help="a folder, a hub id, or pocket")
    parser.add_argument("--max-memory", help="the most device memory to use, as in 8GiB")
    parser.add_argument("-p", "--prompt", action="append", help="a question; may be repeated")
    args = parser.parse_args()
    if args.model == "pocket":
        print("The built-in model is untrained: its words are noise.", file=sys.stderr)
    with LowVRAMOmni.from_pretrained(args.model, args.max_memory, speech=False) as omni:
        seen = {"type": "video", "video": args.video, "fps": 1, "max_pixels": 360 * 420}
        for prompt in args.prompt or QUESTIONS:
            content = [seen, {"type": "text", "text": prompt}]
            turn = [SYSTEM, {"role": "user", "content": content}]
            print(f"{prompt}\n{omni.generate(turn, use_audio_in_video=False).text}\n")


if __name__ == "__main__":
    main()
