"""What is held, and the peaks of phases: by the ledger, and from a device's statistics."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowvram.offload import Device, Meter, open_device
from lowvram.offload import meter as meter_module

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(params=["cpu", "meta"])
def device(request: pytest.FixtureRequest) -> Device:
    return open_device(request.param)


def block(nbytes: int, device: Device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device.torch)


def activations(meter: Meter, phase: str) -> int:
    return next(p for p in meter.phases if p.name == phase).peak_by_owner["activations"]


def test_a_peak_is_the_most_alive_at_once(device: Device) -> None:
    meter = Meter(device)
    with meter.phase("prefill"):
        a = block(4 * KIB, device)
        b = block(8 * KIB, device)
        del a
        c = block(2 * KIB, device)
        del b, c
        d = block(3 * KIB, device)
    assert activations(meter, "prefill") == 12 * KIB
    del d


def test_views_in_place_results_and_earlier_tensors_do_not_count(device: Device) -> None:
    meter = Meter(device)
    weight = block(4 * KIB, device)
    with meter.phase("prefill"):
        rows = weight.view(64, 64).t()[3:].unsqueeze(0)
        rows.add_(1)
        torch.bitwise_not(weight, out=weight)
        rows.expand(2, 61, 64).chunk(2)
        assert rows.detach().data_ptr() >= 0
    assert activations(meter, "prefill") == 0


def test_a_view_keeps_its_storage_counted(device: Device) -> None:
    meter = Meter(device)
    with meter.phase("prefill"):
        whole = block(64 * KIB, device)
        corner = whole[:1]
        del whole
        gc.collect()
        more = block(KIB, device)
        assert activations_now(meter) == 65 * KIB
        del corner
        assert activations_now(meter) == KIB
        del more


def activations_now(meter: Meter) -> int:
    assert meter._ledger is not None
    return meter._ledger.live_bytes


def test_a_storage_that_grows_is_counted_at_its_new_size(device: Device) -> None:
    meter = Meter(device)
    with meter.phase("prefill"):
        tensor = block(0, device)
        tensor.resize_(5 * KIB)
        tensor.resize_(9 * KIB)
        del tensor
        assert activations_now(meter) == 0
    assert activations(meter, "prefill") == 9 * KIB


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_temporaries_inside_composite_operations_count(
    device: Device, mode: type[torch.no_grad]
) -> None:
    """`conv1d` with "same" padding pads in between: input, padded input, output."""
    meter = Meter(device)
    with mode():
        x = torch.zeros(1, 2, 1000, device=device.torch)
        w = torch.zeros(2, 2, 4, device=device.torch)
        with meter.phase("vocode"):
            y = F.conv1d(x, w, padding="same")
    assert y.shape == (1, 2, 1000)
    assert activations(meter, "vocode") == (2 * 1001 + 2 * 1000) * 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_counting_changes_no_bit(mode: type[torch.no_grad]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 96), nn.LayerNorm(96), nn.SiLU(), nn.Linear(96, 48))
    x = torch.randn(2, 5, 48)

    def run() -> torch.Tensor:
        y = net(x)
        y = F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None], is_causal=True)
        return F.rms_norm(torch.einsum("bhij,kj->bhik", y, y[0, 0]), (5,)).matmul(y)

    meter = Meter(open_device("cpu"))
    with mode():
        plain = run()
        with meter.phase("prefill"):
            counted = run()
    assert torch.equal(plain, counted)


def test_only_the_device_s_own_tensors_count() -> None:
    meter = Meter(open_device("meta"))
    with meter.phase("vision"):
        on_host = torch.ones(1000)
        shape = torch.empty(10, device="meta")
    assert activations(meter, "vision") == shape.nbytes
    assert on_host.nbytes == 4000


def test_what_is_held_adds_to_every_peak(device: Device) -> None:
    meter = Meter(device)
    meter.hold("weights", "text", 100)
    meter.hold("weights", "visual", 30)
    meter.hold("kv", "text", 7)
    with meter.phase("decode"):
        kept = block(50, device)
    meter.release("weights", "visual")
    meter.release("weights", "never held")
    with meter.phase("talk"):
        pass
    decode, talk = meter.phases
    assert decode.peak_by_owner == {"weights": 130, "kv": 7, "activations": 50}
    assert decode.peak_bytes == 187
    assert talk.peak_by_owner == {"weights": 100, "kv": 7, "activations": 0}
    assert meter.held() == {"weights": 100, "kv": 7}
    assert kept.nbytes == 50


def test_holding_again_replaces(device: Device) -> None:
    meter = Meter(device)
    meter.hold("carry", "states", 100)
    meter.hold("carry", "states", 60)
    assert meter.held() == {"carry": 60}


def test_tensors_handed_to_an_owner_count_once(device: Device) -> None:
    meter = Meter(device)
    with meter.phase("prefill"):
        cache = block(10 * KIB, device)
        meter.hold("kv", "text", cache.nbytes, [cache])
        cache.view(-1, 2).add_(1)
        scratch = block(KIB, device)
        del scratch
    (prefill,) = meter.phases
    assert prefill.peak_by_owner == {"kv": 10 * KIB, "activations": KIB}


def test_a_peak_reached_before_the_handing_over_is_shown_as_the_owner_s(device: Device) -> None:
    meter = Meter(device)
    with meter.phase("prefill"):
        cache = block(10 * KIB, device)
        meter.hold("kv", "text", cache.nbytes, [cache])
    assert meter.phases[0].peak_by_owner == {"kv": 10 * KIB, "activations": 0}


def test_what_is_held_and_dropped_inside_a_phase_is_in_its_peak(device: Device) -> None:
    meter = Meter(device)
    with meter.phase("vision"):
        meter.hold("weights", "visual", 500)
        meter.release("weights", "visual")
    assert meter.phases[0].peak_by_owner == {"weights": 500, "activations": 0}


def test_shapes_made_aside_do_not_count(device: Device) -> None:
    meter = Meter(device)
    with meter.phase("prefill"):
        with meter.aside():
            skeleton = block(MIB, device)
        first = block(KIB, device)
        skeleton.add_(1)
    assert activations(meter, "prefill") == first.nbytes


def test_an_entry_starts_from_nothing_and_nothing_counts_in_between(device: Device) -> None:
    meter = Meter(device)
    kept = []
    for _ in range(3):
        with meter.phase("vision"):
            kept.append(block(KIB, device))
        kept.append(block(MIB, device))
    assert [p.name for p in meter.phases] == ["vision"]
    assert activations(meter, "vision") == KIB


def test_stepwise_phases_are_looked_at_ever_more_rarely(device: Device) -> None:
    meter = Meter(device)
    counted = []
    for step in range(1, 70):
        with meter.phase("decode", stepwise=True):
            if meter._ledger is not None:
                counted.append(step)
    assert counted == [1, 2, 3, 4, 8, 16, 32, 64]
    for _ in range(5):
        with meter.phase("vision"):
            assert meter._ledger is not None


def test_seconds_add_up_over_entries(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: next(clock))
    meter = Meter(device)
    for _ in range(3):
        start = next(clock)
        with meter.phase("decode"):
            pass
        end = next(clock)
    seconds = meter.phases[0].seconds
    assert 3 <= seconds <= 3 * (end - start)


def test_an_error_inside_closes_the_phase(device: Device) -> None:
    meter = Meter(device)
    with pytest.raises(KeyError), meter.phase("prefill"):
        failed = block(KIB, device)
        raise KeyError
    assert activations(meter, "prefill") == failed.nbytes
    with meter.phase("prefill"):
        more = block(2 * KIB, device)
    assert activations(meter, "prefill") == more.nbytes


def test_misuse_is_refused(device: Device) -> None:
    meter = Meter(device)
    with pytest.raises(ValueError, match="unknown owner 'wieghts'; wanted one of weights, slabs"):
        meter.hold("wieghts", "text", 1)
    with (
        meter.phase("decode"),
        pytest.raises(RuntimeError, match="'talk' begins inside phase 'decode'"),
        meter.phase("talk"),
    ):
        pass


def test_a_new_request_forgets_the_phases_and_keeps_what_is_held(device: Device) -> None:
    meter = Meter(device)
    meter.hold("weights", "text", 9)
    with meter.phase("decode"):
        pass
    meter.restart()
    assert meter.phases == []
    assert [point.bytes_by_owner for point in meter.timeline] == [{"weights": 9}]
    with meter.phase("vision"):
        pass
    assert [p.name for p in meter.phases] == ["vision"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the meter sees; every look takes a tenth of one."""
    seconds = [0.0]

    def look() -> float:
        seconds[0] += 0.1
        return seconds[0]

    monkeypatch.setattr(meter_module.time, "perf_counter", look)
    return seconds


def test_the_timeline_tells_when_what_was_held(device: Device, clock: list[float]) -> None:
    meter = Meter(device)
    with meter.phase("vision"):
        meter.hold("weights", "visual", 500)
        kept = block(20, device)
        meter.release("weights", "visual")
    with meter.phase("prefill"):
        meter.hold("kv", "thinker", 7)
        meter.hold("kv", "talker", 3)
    points = [(p.phase, p.bytes_by_owner) for p in meter.timeline]
    levels = [point for i, point in enumerate(points) if point != points[i - 1]]
    assert levels == [
        ("", {}),
        ("vision", {}),
        ("vision", {"weights": 500}),
        ("vision", {"weights": 500, "activations": 20}),
        ("vision", {"activations": 20}),
        ("", {}),
        ("prefill", {}),
        ("prefill", {"kv": 7}),
        ("prefill", {"kv": 10}),
        ("", {"kv": 10}),
    ]
    assert meter.timeline[-1].bytes_by_key == {"kv": {"thinker": 7, "talker": 3}}
    seconds = [p.seconds for p in meter.timeline]
    assert seconds == sorted(seconds)
    assert kept.nbytes == 20


def test_many_entries_of_one_phase_are_one_stretch_of_it(device: Device) -> None:
    meter = Meter(device)
    for _ in range(40):
        with meter.phase("decode", stepwise=True):
            block(5, device)
    told = [p.phase for p in meter.timeline]
    assert told[0] == "" and set(told[1:-1]) <= {"decode"}


class Card:
    """A device with statistics of its own: a context of 100 and whatever a test makes its peak."""

    name, type = "cuda:0", "cuda"

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.synchronized = 0

    def context_bytes(self) -> int:
        return 100

    def reset_peak(self) -> None:
        self.peak = self.now

    def peak_bytes(self) -> int:
        return 100 + self.peak

    def synchronize(self) -> None:
        self.synchronized += 1

    def take(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def test_an_accelerator_s_own_statistics_are_its_peaks() -> None:
    card = Card()
    meter = Meter(card)  # type: ignore[arg-type]
    card.take(1000)
    meter.hold("weights", "text", 1000)
    for step in range(6):
        with meter.phase("decode", stepwise=True):
            card.take(step)
            card.take(-step)
        card.take(50)  # between entries
        card.take(-50)
    (decode,) = meter.phases
    assert decode.peak_by_owner == {"context": 100, "weights": 1000, "activations": 5}
    assert decode.peak_bytes == 1105
    assert card.synchronized == 4  # entries 1, 2, 3, 4
    assert max(sum(point.bytes_by_owner.values()) for point in meter.timeline) == 1105


def test_owners_that_claim_more_than_the_device_saw_are_believed() -> None:
    meter = Meter(Card())  # type: ignore[arg-type]
    meter.hold("weights", "text", 1000)
    with meter.phase("decode"):
        pass
    assert meter.phases[0].peak_bytes == 1100
    assert sum(meter.phases[0].peak_by_owner.values()) == 1100
