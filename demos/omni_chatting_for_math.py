"""Solve what is written, and asked, in a video: the answer as text and as a WAV file.

python demos/omni_chatting_for_math.py
python demos/omni_chatting_for_math.py lesson.mp4 -m Qwen/Qwen2.5-Omni-3B --max-memory 8GiB
"""

import argparse
import sys
from pathlib import Path

import soundfile

from lowvram import LowVRAMOmni

LESSON = Path(__file__).parent / "media" / "math.mp4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", nargs="?", default=str(LESSON))
    parser.add_argument("-m", "--model", default="pocket", help="a folder, a hub id, or pocket")
    parser.add_argument("--max-memory", help="the most device memory to use, as in 8GiB")
    parser.add_argument("--max-speech", type=float, help="seconds of speech at most")
    parser.add_argument("--speaker", help="the voice (default: the model's first)")
    parser.add_argument("-o", "--output", default="math.wav", help="a file for the reply")
    args = parser.parse_args()
    if args.model == "pocket":
        print("The built-in model is untrained: its words and voice are noise.", file=sys.stderr)
    question = {"role": "user", "content": [{"type": "video", "video": args.video}]}
    options = {"speaker": args.speaker, "max_speech_seconds": args.max_speech}
    with LowVRAMOmni.from_pretrained(args.model, args.max_memory) as omni:
        result = omni.generate([question], max_pixels=360 * 420, **options)
        soundfile.write(args.output, result.audio, result.sample_rate)
    print(f"{result.text}\n[{args.output}: {result.report.audio_seconds:.1f} s]")


if __name__ == "__main__":
    main()
