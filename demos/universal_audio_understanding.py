"""Understand a recording: write down what is said, translate it, or name what makes the sound.

python demos/universal_audio_understanding.py
python demos/universal_audio_understanding.py talk.wav --task "speech translation" -m FOLDER
"""

import argparse
import sys
from pathlib import Path

from lowvram import LowVRAMOmni

RECORDING = Path(__file__).parent / "media" / "recording.flac"
TASKS = {
    "speech recognition": "Transcribe the audio into text without any punctuation marks.",
    "speech translation": "Listen to the provided speech and translate it into Chinese text.",
    "vocal sound classification": "Classify the given human vocal sound in English.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording", nargs="?", default=str(RECORDING))
    parser.add_argument("-m", "--model", default="pocket", help="a folder, a hub id, or pocket")
    parser.add_argument("--max-memory", help="the most device memory to use, as in 8GiB")
    parser.add_argument("--task", choices=TASKS, help="one of them (default: all three)")
    args = parser.parse_args()
    if args.model == "pocket":
        print("The built-in model is untrained: its words are noise.", file=sys.stderr)
    with LowVRAMOmni.from_pretrained(args.model, args.max_memory, speech=False) as omni:
        for task in [args.task] if args.task else TASKS:
            heard = {"type": "audio", "audio": args.recording}
            turn = {"role": "user", "content": [{"type": "text", "text": TASKS[task]}, heard]}
            system = f"You are a {task} model."
            print(f"{task}: {omni.generate([turn], system=system, max_new_tokens=256).text}")


if __name__ == "__main__":
    main()
