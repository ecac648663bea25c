"""A small calibration set that needs no files: texts in several languages, pictures, sounds and
short clips, all written or computed here, so that nobody else's rights are in them. Torch-free.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lowvram.conversation import SAMPLE_RATE, SPEECH_PROMPT

Conversation = list[dict[str, Any]]

_KINDS = ("text", "picture", "text", "speech", "text", "tones", "text", "clip")

TEXTS = (
    "The lighthouse keeper wrote down the weather every evening: wind from the west, rain before "
    "midnight, two ships far out. After forty years the notebooks filled a whole shelf, and people "
    "who had never seen the sea came to read them. Which facts would you collect for forty years?",
    "Bitte erkläre in einfachen Worten, warum der Himmel am Abend rot wird. Mein Sohn ist sieben "
    "Jahre alt, kennt Regenbögen und mag Beispiele aus der Küche. Am Ende soll ein kleiner Versuch "
    "stehen, den wir mit einem Glas Wasser, etwas Milch und einer Taschenlampe machen können.",
    "请用三句话介绍一下你自己，然后告诉我怎样在一周之内学会做一道简单的家常菜。"
    "我每天只有二十分钟，厨房里有米饭、鸡蛋、西红柿和一点葱。如果还需要别的材料，请先列一张清单。",
    "¿Qué tren debo tomar si quiero llegar a Sevilla antes del mediodía? Salgo de un pueblo "
    "a las siete y veinte, el autobús tarda cincuenta minutos y no me gusta correr al tren. "
    "Haz una tabla con las opciones y explica cuál es la más tranquila.",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    if "
    "len(ordered) % 2:\n        return ordered[middle]\n    return (ordered[middle - 1] + "
    "ordered[middle]) / 2\n\nWhat does median([]) do? Write three tests and a version that raises "
    "a ValueError with a helpful message.",
    "昨日、駅の近くで小さな本屋を見つけました。店の人は静かで、古い地図をたくさん持っていました。"
    "一枚だけ買うなら、どんな地図を選びますか。理由も短く書いてください。",
    "Une recette de soupe pour six personnes : deux oignons, quatre carottes, un litre et demi de "
    "bouillon, 250 g de lentilles. Combien faut-il de chaque ingrédient pour quatorze personnes ? "
    "Arrondis de manière raisonnable, et dis ce que l'on peut préparer la veille.",
    "Сколько будет 17 умножить на 24? Объясни два способа счёта в уме, а потом придумай задачу для "
    "школьника, в которой нужен такой счёт: например, про билеты, яблоки или ступеньки в башне.",
    "اكتب رسالة قصيرة إلى جارك تشكره فيها على المساعدة في نقل الأثاث، واقترح عليه موعداً لشرب "
    "الشاي في نهاية الأسبوع. استعمل لغة ودودة وبسيطة.",
    "Tabela: janeiro 31, fevereiro 28, março 31, abril 30. Quantos dias há do dia 12 de janeiro ao "
    "dia 3 de abril? Mostre as contas passo a passo e confira o resultado de outra maneira.",
    "오늘 회의에서 결정된 내용을 정리해 주세요: 발표는 다음 주 수요일, 장소는 3층 회의실, 자료는 "
    "월요일까지 제출합니다. 참석하지 못한 사람에게 보낼 짧은 전자우편도 써 주세요.",
    'Return JSON only: {"city": ..., "population": ..., "rivers": [...]}. The text: "Four rivers '
    "meet under the seven bridges of a town of 48,210 people; the oldest bridge has a market, the "
    'newest a tram." If something is not said, use null.',
)
_ASKED = {
    "picture": "Describe the shapes and colours in this picture, from left to right.",
    "speech": "What is being said here, and how does the voice sound?",
    "tones": "Which sounds do you hear, and in which order?",
    "clip": "What happens in this clip, and what do you hear?",
}
_FORMANTS = (
    ((730.0, 1.0), (1090.0, 0.5), (2440.0, 0.1)),
    ((270.0, 1.0), (2290.0, 0.3), (3010.0, 0.2)),
    ((300.0, 1.0), (870.0, 0.2), (2240.0, 0.02)),
    ((570.0, 1.0), (840.0, 0.4), (2410.0, 0.05)),
)
"""Frequencies in Hz, and strengths, of the vowels a, i, u, o (Peterson and Barney, 1952)."""


def builtin_conversation(index: int, seed: int) -> Conversation:
    """Number `index` of an endless set: half texts, half pictures, sounds and clips in turn."""
    random = np.random.default_rng([seed, index])
    kind = _KINDS[index % len(_KINDS)]
    if kind == "text":
        return _asked([_text(_several(random))], index)
    if kind == "picture":
        media: list[dict[str, Any]] = [{"type": "image", "image": draw(random)}]
    elif kind == "speech":
        media = [{"type": "audio", "audio": speak(random, 4.0)}]
    elif kind == "tones":
        media = [{"type": "audio", "audio": ring(random, 3.0)}]
    else:
        media = [
            {"type": "video", "video": film(random), "fps": 2.0},
            {"type": "audio", "audio": ring(random, 2.0)},
        ]
    return _asked([*media, _text(_ASKED[kind])], index)


def _asked(content: list[dict[str, Any]], index: int) -> Conversation:
    """With the system prompt of speech in every second round of the kinds, as in use."""
    speaks = index // len(_KINDS) % 2 == 1
    system = [{"role": "system", "content": SPEECH_PROMPT}] if speaks else []
    return [*system, {"role": "user", "content": content}]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _several(random: np.random.Generator) -> str:
    return "\n\n".join(TEXTS[i] for i in random.permutation(len(TEXTS))[:4])


def draw(random: np.random.Generator) -> np.ndarray:
    """A picture of coloured shapes over a gradient: uint8 [h, w, 3]."""
    height, width = 224, 280
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    ends = random.uniform(0, 255, (2, 3))
    slope = (rows / height * random.random() + columns / width)[..., None] / 2
    image = ends[0] * (1 - slope) + ends[1] * slope
    for _ in range(6):
        row, column, size = random.uniform([0, 0, 10], [height, width, 70])
        away = np.abs(rows - row), np.abs(columns - column)
        inside = np.hypot(*away) < size if random.random() < 0.5 else np.maximum(*away) < size
        image[inside] = random.uniform(0, 255, 3)
    image += random.normal(0, random.uniform(0, 12), image.shape)
    return image.clip(0, 255).astype(np.uint8)


def film(random: np.random.Generator) -> np.ndarray:
    """Frames of a disc that crosses a still picture: uint8 [4, h, w, 3]."""
    still = draw(random)[:112, :140]
    rows, columns = np.mgrid[:112, :140]
    colour = random.uniform(0, 255, 3).astype(np.uint8)
    frames = np.stack([still] * 4)
    for index, frame in enumerate(frames):
        frame[np.hypot(rows - 60, columns - 20 - 32 * index) < 18] = colour
    return frames


def speak(random: np.random.Generator, seconds: float) -> np.ndarray:
    """Vowels of a gliding voice, with hisses between: float32 [n] at 16 kHz."""
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < seconds * SAMPLE_RATE:
        long = random.uniform(0.12, 0.4)
        t = np.arange(int(long * SAMPLE_RATE)) / SAMPLE_RATE
        pitch, glide = random.uniform(90, 230), random.uniform(-0.3, 0.3)
        phase = 2 * np.pi * pitch * (t + glide * t**2 / (2 * long))
        vowel, wave = _FORMANTS[random.integers(len(_FORMANTS))], np.zeros_like(t)
        for harmonic in range(1, int(7000 / pitch)):
            strength = sum(
                gain / (1 + ((harmonic * pitch - formant) / 90) ** 2) for formant, gain in vowel
            )
            wave += strength * np.sin(harmonic * phase)
        fade = np.minimum(1, np.minimum(t, long - t) / 0.03)
        hiss = random.normal(0, 0.03, int(random.uniform(0.02, 0.12) * SAMPLE_RATE))
        parts += [wave * fade / np.abs(wave).max() * 0.5, hiss]
    return np.concatenate(parts)[: int(seconds * SAMPLE_RATE)].astype(np.float32)


def ring(random: np.random.Generator, seconds: float) -> np.ndarray:
    """Struck tones over a faint noise: float32 [n] at 16 kHz."""
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    wave = random.normal(0, 0.005, len(t))
    for start in np.arange(0.1, seconds, 0.4):
        since = np.maximum(t - start, 0)
        frequency = 220 * 2 ** (random.integers(0, 36) / 12)
        tone = np.sin(2 * np.pi * frequency * since) * np.exp(-since * random.uniform(4, 20))
        wave += np.where(t >= start, tone, 0) * 0.3
    return wave.clip(-1, 1).astype(np.float32)
