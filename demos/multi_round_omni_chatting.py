"""Talk while something is drawn: every video is a round, and what was seen and said is remembered.

python demos/multi_round_omni_chatting.py [draw1.mp4 draw2.mp4 -m Qwen/Qwen2.5-Omni-7B]
"""

import argparse
import sys
from pathlib import Path

import soundfile

from lowvram import LowVRAMOmni

MEDIA = Path(__file__).parent / "media"
DRAWINGS = [str(MEDIA / f"drawing-{number}.mp4") for number in (1, 2, 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", nargs="*", default=DRAWINGS)
    parser.add_argument("-m", "--model", default="pocket", help="a folder, a hub id, or pocket")
    parser.add_argument("--max-memory", help="the most device memory to use, as in 8GiB")
    parser.add_argument("--max-speech", type=float, help="seconds of speech at most, each round")
    parser.add_argument("-o", "--output", type=Path, default=Path("."), help="a folder for replies")
    args = parser.parse_args()
    if args.model == "pocket":
        print("The built-in model is untrained: its words and voice are noise.", file=sys.stderr)
    args.output.mkdir(parents=True, exist_ok=True)
    with LowVRAMOmni.from_pretrained(args.model, args.max_memory) as omni:
        chat = omni.chat(max_pixels=360 * 420, max_speech_seconds=args.max_speech)
        for number, video in enumerate(args.video, 1):
            result = chat.send([{"type": "video", "video": video}])
            path = args.output / f"round-{number}.wav"
            soundfile.write(path, result.audio, result.sample_rate)
            print(f"{result.text}\n[{path}: {result.report.audio_seconds:.1f} s]")


if __name__ == "__main__":
    main()
