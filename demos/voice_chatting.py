"""Speak and be spoken to: each recording is a turn of one conversation, each reply a WAV file.

python demos/voice_chatting.py [hello.wav more.wav -m Qwen/Qwen2.5-Omni-3B --max-memory 8GiB]
"""

import argparse
import sys
from pathlib import Path

import soundfile

from lowvram import LowVRAMOmni

RECORDING = Path(__file__).parent / "media" / "recording.flac"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording", nargs="*", default=[str(RECORDING)])
    parser.add_argument("-m", "--model", default="pocket", help="a folder, a hub id, or pocket")
    parser.add_argument("--max-memory", help="the most device memory to use, as in 8GiB")
    parser.add_argument("--max-speech", type=float, help="seconds of speech at most, each reply")
    parser.add_argument("--speaker", help="the voice (default: the model's first)")
    parser.add_argument("-o", "--output", type=Path, default=Path("."), help="a folder for replies")
    args = parser.parse_args()
    if args.model == "pocket":
        print("The built-in model is untrained: its words and voice are noise.", file=sys.stderr)
    args.output.mkdir(parents=True, exist_ok=True)
    with LowVRAMOmni.from_pretrained(args.model, args.max_memory) as omni:
        chat = omni.chat(speaker=args.speaker, max_speech_seconds=args.max_speech)
        for turn, recording in enumerate(args.recording, 1):
            result = chat.send([{"type": "audio", "audio": recording}])
            path = args.output / f"reply-{turn}.wav"
            soundfile.write(path, result.audio, result.sample_rate)
            print(f"{result.text}\n[{path}: {result.report.audio_seconds:.1f} s]")


if __name__ == "__main__":
    main()
