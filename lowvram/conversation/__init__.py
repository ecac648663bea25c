"""From messages and media to a prompt: ids, positions, pixels and mel features. Free of torch."""

from lowvram.conversation.imagined import imagined_media, shape_of
from lowvram.conversation.messages import SPEECH_PROMPT
from lowvram.conversation.positions import check_window
from lowvram.conversation.prepare import measure, measure_without_tokenizer, prepare
from lowvram.conversation.prompt import AudioInput, Prompt, PromptShape, VisionInput
from lowvram.conversation.settings import MediaSettings
from lowvram.conversation.tokenizer import TextStream, Tokenizer
from lowvram.conversation.tokens import SAMPLE_RATE, audio_tokens

__all__ = [
    "SAMPLE_RATE",
    "SPEECH_PROMPT",
    "AudioInput",
    "MediaSettings",
    "Prompt",
    "PromptShape",
    "TextStream",
    "Tokenizer",
    "VisionInput",
    "audio_tokens",
    "check_window",
    "imagined_media",
    "measure",
    "measure_without_tokenizer",
    "prepare",
    "shape_of",
]
