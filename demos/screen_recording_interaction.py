"""Ask about a recording of a screen: understand it, read it, sum it up, translate it.

python demos/screen_recording_interaction.py
python demos/screen_recording_interaction.py screen.mp4 -p "Who wrote this paper?" -m FOLDER
"""

import argparse
import sys
from pathlib import Path

from lowvram import LowVRAMOmni

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
QUESTIONS = (
    "What is being done in this recording?",
    "Read the text on the screen.",
    "Summarize the text on the screen in one sentence.",
    "Please translate the text on the screen into Chinese.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", nargs="?", default=Path(__file__).parent / "media/screen.mp4")
    parser.add_argument("-m", "--model", default="pocket", help="a folder, a hub id, or pocket")
    parser.add_argument("--max-memory", help="the most device memory to use, as in 8GiB")
    parser.add_argument("-p", "--prompt", action="append", help="a question; may be repeated")
    args = parser.parse_args()
    if args.model == "pocket":
        print("The built-in model is untrained: its words are noise.", file=sys.stderr)
    with LowVRAMOmni.from_pretrained(args.model, args.max_memory, speech=False) as omni:
        seen = {"type": "video", "video": args.video, "max_pixels": 360 * 420}
        for prompt in args.prompt or QUESTIONS:
            turn = [SYSTEM, {"role": "user", "content": [seen, {"type": "text", "text": prompt}]}]
            print(f"{prompt}\n{omni.generate(turn, use_audio_in_video=False).text}\n")


if __name__ == "__main__":
    main()
