"""Talk about a piece of music that is seen and heard: text and speech arrive while they are made.

python demos/omni_chatting_for_music.py
python demos/omni_chatting_for_music.py concert.mp4 -m Qwen/Qwen2.5-Omni-3B --max-memory 8GiB
"""

import argparse
import sys
from pathlib import Path

import soundfile

from lowvram import AudioChunk, LowVRAMOmni, TextDelta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", nargs="?", default=Path(__file__).parent / "media/music.mp4")
    parser.add_argument("-m", "--model", default="pocket", help="a folder, a hub id, or pocket")
    parser.add_argument("--max-memory", help="the most device memory to use, as in 8GiB")
    parser.add_argument("--max-speech", type=float, help="seconds of speech at most")
    parser.add_argument("-o", "--output", default="music.wav", help="a file for the reply")
    args = parser.parse_args()
    if args.model == "pocket":
        print("The built-in model is untrained: its words and voice are noise.", file=sys.stderr)
    question = {"role": "user", "content": [{"type": "video", "video": args.video}]}
    options = {"max_pixels": 360 * 420, "max_speech_seconds": args.max_speech}
    omni = LowVRAMOmni.from_pretrained(args.model, args.max_memory)
    with omni, soundfile.SoundFile(args.output, "w", 24_000, channels=1) as file:
        for event in omni.stream([question], **options):
            if isinstance(event, TextDelta):
                print(event.text, end="", flush=True)
            elif isinstance(event, AudioChunk):
                file.write(event.samples)
    print(f"\n[{args.output}]")


if __name__ == "__main__":
    main()
