"""transformers' processor for Qwen2.5-Omni, built without the network and without torchvision."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from lowvram.config import ThinkerConfig


def feature_extractor() -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(
        feature_size=128, chunk_length=300, n_fft=400, hop_length=160, sampling_rate=16000
    )


def image_processor(**settings: Any) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**({"min_pixels": 3136, "max_pixels": 12845056} | settings))


class FrameCounter:
    """Stands in for the video processor, which needs torchvision: it only tells the grid."""

    merge_size = 2
    temporal_patch_size = 2

    def __call__(self, videos: list[np.ndarray], **_: Any) -> Any:
        from transformers.feature_extraction_utils import BatchFeature

        grids = [[-(-len(v) // 2), v.shape[1] // 14, v.shape[2] // 14] for v in videos]
        return BatchFeature({"video_grid_thw": np.array(grids)})


def processor(tokenizer_folder: Path) -> Any:
    from transformers import AutoTokenizer
    from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor

    class Processor(Qwen2_5OmniProcessor):
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return type(argument)

    return Processor(
        image_processor=image_processor(),
        video_processor=FrameCounter(),
        feature_extractor=feature_extractor(),
        tokenizer=AutoTokenizer.from_pretrained(tokenizer_folder),
    )


def with_sound() -> dict[str, Any]:
    """How `processor(...)` is told that each video brings its sound; 5.23 renamed it."""
    from transformers import processing_utils

    if hasattr(processing_utils, "OmniModalProcessorMixin"):
        return {"load_audio_from_video": True}
    return {"use_audio_in_video": True}


def rope_index(config: ThinkerConfig, ids: np.ndarray, **media: Any) -> np.ndarray:
    """`get_rope_index` of transformers for one prompt, int64 [3, T]."""
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as theirs

    base = theirs.Qwen2_5OmniPreTrainedModelForConditionalGeneration
    host = SimpleNamespace(
        spatial_merge_size=config.vision.spatial_merge_size,
        config=SimpleNamespace(
            image_token_id=config.image_token_index,
            video_token_id=config.video_token_index,
            audio_token_id=config.audio_token_index,
            vision_start_token_id=config.vision_start_token_id,
            audio_start_token_id=config.audio_start_token_id,
            position_id_per_seconds=config.position_id_per_seconds,
            seconds_per_chunk=config.seconds_per_chunk,
        ),
    )
    for name in ("get_llm_pos_ids_for_vision", "get_chunked_index"):
        setattr(host, name, getattr(base, name).__get__(host))
    row = torch.from_numpy(ids)[None]
    found, delta = base.get_rope_index(host, row, attention_mask=torch.ones_like(row), **media)
    assert int(delta) == int(found.max()) + 1 - len(ids)
    return found[:, 0].numpy()
