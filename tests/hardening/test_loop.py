"""The loop on a network of one layer: what a checkpoint must hold, and what a resumed run's records are."""

import copy
import math
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from detguard import DetguardError
from detguard.data.ahead import AheadError
from detguard.detectors.gated import GatedNetwork
from detguard.detectors.load import fused, save_gated
from detguard.hardening import loop
from detguard.hardening.loop import HEALTHY, LOG_EVERY, BatchLog, Pace, Validate, diverged, load_made, train
from detguard.hardening.optimizer import Optimizer
from detguard.runs import Run

LAST = 2 * LOG_EVERY + 5
PACE = Pace(LAST, 1e-2, 1e-2, 1e9)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.gate = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.gate(self.layer(x)).square().mean()


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path, {"command": "harden"})
    run.claim()
    return run


def trained(run, stop=None, made=None, log=True, harm=lambda call: 1.0, pace=PACE, **options):
    """harm: what the losses of batches, by their calls, are multiplied by."""
    network, calls = Network(), []

    def batches(first):
        for number in range(first, LAST):
            yield torch.randn(5, 4, generator=torch.Generator().manual_seed(number))

    def learn(batch, number, done, update):
        calls.append(number)
        loss = network(batch) * harm(len(calls))
        update(loss)
        return {"loss": loss}

    train(
        network, list(network.parameters()), made or batches, learn, pace,
        run.folder / "last.pt", lambda number, *_: number == stop, BatchLog(run, "a", LAST, 5) if log else None,
        **options,
    )  # fmt: skip
    return network


def without_times(records):
    return [{k: v for k, v in r.items() if k != "photos_per_second"} for r in records]


@pytest.mark.parametrize("stop", [3, LOG_EVERY - 1, LOG_EVERY + 7])
def test_a_resumed_run_has_the_records_and_weights_of_an_unbroken_one(run, stop):
    whole, records = trained(run), without_times(run.records())
    assert [r["batch"] for r in records] == [LOG_EVERY, 2 * LOG_EVERY, LAST]
    run.keep([])
    with pytest.raises(KeyboardInterrupt):
        trained(run, stop)
    # What a run that was killed later did after its last checkpoint is done again.
    run.append({"stage": "a", "batch": 2 * LOG_EVERY, "photos_per_second": 1.0, "loss": 9.0})
    resumed = trained(run)
    assert without_times(run.records()) == records
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


def test_a_link_among_checkpoints_is_not_copied_into_the_run(run, tmp_path_factory):
    secret = tmp_path_factory.mktemp("home") / "id_rsa"
    secret.write_bytes(b"secret")
    (run.folder / "last.1.pt").symlink_to(secret)
    with pytest.raises(KeyboardInterrupt):
        trained(run, 3)
    assert not (run.folder / "last.2.pt").exists()
    assert secret.read_bytes() == b"secret"


def test_records_of_other_stages_stay(run):
    other = {"stage": "b", "batch": LAST, "photos_per_second": 1.0, "loss": 9.0}
    run.append(other)
    trained(run)
    assert run.records()[0] == other


def test_when_no_more_batches_can_be_made_the_checkpoint_is_saved(run):
    def few(first):
        yield from (torch.ones(5, 4) for _ in range(3))
        raise AheadError("killed")

    with pytest.raises(AheadError):
        trained(run, made=few)
    assert torch.load(run.folder / "last.pt")["progress"]["number"] == 3


def test_what_diverged_before_no_more_batches_can_be_made_is_not_saved(run):
    def few(first):
        yield from (torch.ones(5, 4) for _ in range(3))
        raise AheadError("killed")

    with pytest.raises(AheadError):
        trained(run, made=few, harm=lambda call: float("nan") if call == 2 else 1.0)
    assert torch.load(run.folder / "last.pt")["progress"]["number"] == 0


def test_a_stage_that_diverges_goes_back_at_half_the_rate_and_says_so(run):
    trained(run, harm=lambda call: float("nan") if call == LOG_EVERY + 3 else 1.0)
    (told,) = [r for r in run.records() if "diverged" in r]
    assert told == {"stage": "a", "batch": 0, "diverged": 2 * LOG_EVERY, "setbacks": 1}
    assert [r["batch"] for r in run.records() if "loss" in r] == [LOG_EVERY, 2 * LOG_EVERY, LAST]


def test_a_resumed_stage_knows_what_its_loss_was(run):
    with pytest.raises(KeyboardInterrupt):
        trained(run, LOG_EVERY + 3)
    trained(run, harm=lambda call: 1e6 if call == 1 else 1.0)
    assert [r["setbacks"] for r in run.records() if "diverged" in r] == [1]


def test_a_loss_that_grows_tenfold_has_diverged_and_one_that_begins_at_none_has_not():
    assert diverged(21.0, [2.0, 2.0])
    assert diverged(math.inf, [])
    assert not diverged(19.0, [2.0, 2.0])
    assert not diverged(5.0, [0.001])
    assert not diverged(1e6, [])


def test_the_small_losses_of_feature_maps_diverge_as_well():
    assert diverged(2.1, [0.2] * HEALTHY)
    assert not diverged(1.9, [0.2] * HEALTHY)
    assert not diverged(0.9, [0.001] * HEALTHY)


def test_one_that_diverges_again_and_again_is_an_error(run):
    with pytest.raises(DetguardError, match=r"a: the loss grew out of all bounds at batch 20 .*`rate`"):
        trained(run, harm=lambda call: float("nan"))
    assert [r["setbacks"] for r in run.records()] == [1, 2, 3]


@pytest.mark.parametrize("last", [400, None])
def test_rates_rise_over_a_tenth_of_a_short_stage_in_photos_or_in_hours(last):
    pace = Pace(last, 1.0, 1.0, 60, None if last else 400.0)
    shares = [pace.share(number, pace.done(number, float(number))) for number in range(400)]
    assert max(shares) == pytest.approx(0.976, abs=0.003)
    assert sum(shares) / 400 == pytest.approx(0.46, abs=0.03)


@pytest.mark.parametrize("until", [LOG_EVERY + 4, 10**6])
def test_a_stage_in_hours_whose_last_batches_diverge_goes_back_as_any_other(run, monkeypatch, until):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def harm(call):
        clock.now += 0.1
        return float("nan") if LOG_EVERY + 3 <= call <= until else 1.0

    pace = Pace(None, 1e-2, 1e-2, 1e9, 0.1 * (LOG_EVERY + 5) - 0.01)  # over before another record
    if until == 10**6:
        with pytest.raises(DetguardError, match=r"out of all bounds .*, after going back 3 times"):
            trained(run, harm=harm, pace=pace)
    else:
        weight = trained(run, harm=harm, pace=pace).layer.weight
        assert weight.isfinite().all()
    assert [r["setbacks"] for r in run.records() if "diverged" in r] == list(range(1, 2 if until < 100 else 4))


def test_the_best_average_on_photos_held_out_is_what_a_stage_ends_at(run):
    told = iter([3.0, 1.0, 2.0])

    def losses():
        return {"attacked": torch.tensor(next(told)), "clean": torch.tensor(0.0)}, []

    last = trained(run, validate=Validate(LOG_EVERY, losses))
    assert [(r["batch"], r["attacked"]) for r in run.records() if "attacked" in r] == [(20, 3), (40, 1), (LAST, 2)]
    told = iter([3.0, 2.0, 1.0])
    run.keep([])
    (run.folder / "last.pt").unlink()
    assert not torch.equal(trained(run, validate=Validate(LOG_EVERY, losses)).layer.weight, last.layer.weight)


def test_hours_are_those_of_all_the_runs_of_a_stage(run, monkeypatch):
    pace, clock = Pace(None, 1e-2, 1e-2, 1e9, seconds=0.5), SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def endless(first):
        for number in range(first, 10**6):
            clock.now += 0.01
            yield torch.randn(5, 4, generator=torch.Generator().manual_seed(number))

    with pytest.raises(KeyboardInterrupt):
        trained(run, 20, made=endless, pace=pace)
    before = torch.load(run.folder / "last.pt")["progress"]
    clock.now = 1e6  # between the runs
    trained(run, made=endless, pace=pace)
    assert before["spent"] == pytest.approx(0.21)
    assert run.records()[-1]["batch"] == 50


def test_the_last_few_checkpoints_are_kept(run):
    for stop in (1, 2, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            trained(run, stop, log=False)
    numbers = [torch.load(run.folder / name)["progress"]["number"] for name in ("last.pt", "last.1.pt", "last.2.pt")]
    assert numbers == [5, 4, 3]
    assert len(list(run.folder.glob("*.pt"))) == 3


def test_going_back_takes_no_older_checkpoint_away(run):
    for stop in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            trained(run, stop, log=False)
    with pytest.raises(DetguardError, match="out of all bounds"):
        trained(run, harm=lambda call: float("nan"))
    numbers = [torch.load(run.folder / name)["progress"]["number"] for name in ("last.pt", "last.1.pt", "last.2.pt")]
    assert numbers == [0, 2, 0]  # of the newest no good came, three times


def as_folder(file, state):
    file.unlink()
    file.mkdir()


def as_pipe(file, state):
    file.unlink()
    os.mkfifo(file)


def cut_short(file, state):
    file.write_bytes(file.read_bytes()[:-500])


def saved(change):
    def put(file, state):
        changed = change(copy.deepcopy(state))
        torch.save(state if changed is None else changed, file)

    return put


def at(*path, value):
    def change(state):
        inside = state
        for step in path[:-1]:
            inside = inside[step]
        inside[path[-1]] = value
        return state

    return saved(change)


@pytest.mark.parametrize(
    "damage",
    {
        "folder": as_folder,
        "pipe": as_pipe,
        "cut short": cut_short,
        "empty": lambda file, state: file.write_bytes(b""),
        "text": lambda file, state: file.write_text("no state"),
        "an object": saved(lambda state: SimpleNamespace()),
        "a list": saved(lambda state: [1, 2]),
        "an int": saved(lambda state: 7),
        "nothing in it": saved(lambda state: {}),
        "a foreign network": at("network", value={"a": torch.zeros(3)}),
        "a network of numbers": at("network", "layer.weight", value=3),
        "weights of another shape": at("network", "layer.weight", value=torch.zeros(4, 3)),
        "weights of another type": at("network", "layer.weight", value=torch.zeros(3, 4, dtype=torch.int64)),
        "an average of other weights": at("average", 0, value=torch.zeros(9)),
        "a count of updates below zero": at("updates", value=-10),
        "a number of text": at("progress", "number", value="3"),
        "a number beyond the last": at("progress", "number", value=LAST + 1),
        "a number below zero": at("progress", "number", value=-1),
        "a number that is no int": at("progress", "number", value=True),
        "losses of text": at("waiting", value=[{"loss": "low"}]),
        "losses without names": at("waiting", value=torch.zeros(2, 7)),
        "names of losses that are none": at("names", value=[3]),
        "no progress": at("progress", value=3),
        "time that ran backwards": at("progress", "spent", value=-1.0),
        "best weights of another shape": at("progress", "kept", value=[torch.zeros(2)]),
        "no optimizer": at("optimizer", value=None),
        "momenta that would be spread": at("optimizer", "momenta", 0, value=torch.zeros(1)),
        "too few sizes": at("optimizer", "sizes", value=[]),
        "Adam's state for others": at("optimizer", "adam", "state", 99, value={}),
        "Adam's state of another shape": at("optimizer", "adam", "state", 0, "exp_avg", value=torch.zeros(9)),
        "no Adam": at("optimizer", "adam", value=None),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_state_that_is_none_is_one_clear_line(run, damage):
    with pytest.raises(KeyboardInterrupt):
        trained(run, 3, log=False)
    file = run.folder / "last.pt"
    damage[1](file, torch.load(file))
    with pytest.raises(DetguardError, match=r"last\.pt: .*delete it to begin the stage again"):
        trained(run, log=False)


def test_options_of_adam_are_not_taken_from_a_state(run):
    whole = trained(run, log=False)
    with pytest.raises(KeyboardInterrupt):
        trained(run, 3, log=False)
    state = torch.load(run.folder / "last.pt")
    state["optimizer"]["adam"]["param_groups"] = [{"betas": "none"}]
    torch.save(state, run.folder / "last.pt")
    assert torch.equal(trained(run, log=False).layer.bias, whole.layer.bias)


def test_a_stage_is_done_when_weights_and_card_are_there(tmp_path):
    network, file = Network(), tmp_path / "a.safetensors"
    assert not load_made(network, file)
    save_file({key: value + 1 for key, value in network.state_dict().items()}, file)
    assert not load_made(network, file)
    file.with_suffix(".json").write_text("{}")
    assert load_made(network, file)
    assert torch.equal(network.layer.weight, Network().layer.weight + 1)


@pytest.mark.parametrize("damage", ["cut short", "text", "folder", "foreign", "another type"])
def test_weights_of_a_stage_that_are_none_are_one_clear_line(tmp_path, damage):
    network, file = Network(), tmp_path / "a.safetensors"
    file.with_suffix(".json").write_text("{}")
    save_file(network.state_dict(), file)
    if damage == "cut short":
        cut_short(file, None) if len(file.read_bytes()) > 500 else file.write_bytes(file.read_bytes()[:-20])
    elif damage == "text":
        file.write_text("no weights")
    elif damage == "folder":
        as_folder(file, None)
    elif damage == "foreign":
        save_file({"a": torch.zeros(2)}, file)
    else:
        save_file({key: value.half() for key, value in network.state_dict().items()}, file)
    with pytest.raises(DetguardError, match=r"a\.safetensors"):
        load_made(network, file)


def test_weights_are_written_when_their_card_is_there(bundled_model, tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(DetguardError, match="cannot be written"):
        save_gated(GatedNetwork(fused(bundled_model), 22), {}, tmp_path / "a.safetensors")
    assert (tmp_path / "a.json").exists()


def test_after_a_setback_the_same_batch_is_learned_at_half_the_rate(run, monkeypatch):
    rates, update = [], Optimizer.update
    monkeypatch.setattr(Optimizer, "update", lambda self, loss, rate: rates.append(rate) or update(self, loss, rate))
    trained(run, harm=lambda call: float("nan") if call == LOG_EVERY + 3 else 1.0)
    assert rates[2 * LOG_EVERY] == pytest.approx(rates[0] / 2)


def test_a_resumed_stage_ends_at_the_best_weights_seen_before_it_stopped(run):
    def judged(*told):
        left = iter(told)
        return Validate(LOG_EVERY, lambda: ({"attacked": torch.tensor(next(left)), "clean": torch.tensor(0.0)}, []))

    whole = trained(run, validate=judged(1.0, 2.0, 3.0))
    run.keep([])
    (run.folder / "last.pt").unlink()
    with pytest.raises(KeyboardInterrupt):
        trained(run, LOG_EVERY + 3, validate=judged(1.0))
    assert torch.equal(trained(run, validate=judged(2.0, 3.0)).layer.weight, whole.layer.weight)


def test_of_weights_that_are_as_robust_those_are_best_that_are_better_on_clean_photos(run):
    def ended(*told):
        left = iter(told)
        losses = lambda: (dict(zip(("attacked", "clean"), map(torch.tensor, next(left)), strict=True)), [])  # noqa: E731
        (run.folder / "last.pt").unlink(missing_ok=True)
        return trained(run, validate=Validate(LOG_EVERY, losses)).layer.weight

    second = ended((2.0, 2.0), (1.0, 1.0), (2.0, 2.0))
    assert torch.equal(ended((1.0, 0.9), (1.01, 0.5), (1.3, 0.4)), second)


def test_weights_that_a_training_starts_from_may_be_its_best(run):
    def judged(*told, start):
        left = iter(told)
        losses = lambda: ({"attacked": torch.tensor(next(left)), "clean": torch.tensor(0.0)}, [])  # noqa: E731
        return Validate(LOG_EVERY, losses, start=start)

    last = trained(run, validate=judged(1.0, 2.0, 3.0, 4.0, start=True))
    assert all(torch.equal(value, last.state_dict()[key]) for key, value in Network().state_dict().items())
    assert [r["batch"] for r in run.records() if "attacked" in r] == [0, LOG_EVERY, 2 * LOG_EVERY, LAST]
    (run.folder / "last.pt").unlink()  # killed before there was one: it is judged again
    trained(run, validate=judged(4.0, 3.0, 2.0, 1.0, start=True))
    assert [r["attacked"] for r in run.records() if "attacked" in r] == [4.0, 3.0, 2.0, 1.0]


def test_figures_of_photos_held_out_are_told_and_choose_nothing(run):
    left = iter([(1.0, 0.1), (2.0, 0.9), (3.0, 0.5)])

    def losses():
        loss, figure = next(left)
        return {"attacked": torch.tensor(loss), "clean": torch.tensor(0.0)}, [figure]

    at = trained(run, validate=Validate(LOG_EVERY, losses, lambda found: {"AP50 attacked": sum(found)}))
    told = [(r["attacked"], r["AP50 attacked"]) for r in run.records() if "attacked" in r]
    assert told == [(1.0, 0.1), (2.0, 0.9), (3.0, 0.5)]
    (run.folder / "last.pt").unlink()
    falling = iter([1.0, 2.0, 3.0])
    alone = lambda: ({"attacked": torch.tensor(next(falling)), "clean": torch.tensor(0.0)}, [])  # noqa: E731
    assert torch.equal(trained(run, validate=Validate(LOG_EVERY, alone)).layer.weight, at.layer.weight)


def test_a_second_setback_goes_back_further(run):
    pace = Pace(LAST, 1e-2, 1e-2, 0.0)  # a checkpoint after every batch
    trained(run, harm=lambda call: float("nan") if call in (8, 10) else 1.0, pace=pace)
    assert [(r["batch"], r["diverged"]) for r in run.records() if "diverged" in r] == [(7, 8), (7, 9)]


def test_a_checkpoint_too_large_to_be_read_again_ends_a_training_before_it_begins(run, monkeypatch):
    monkeypatch.setattr(loop, "MAX_BYTES", 1000)
    with pytest.raises(DetguardError, match=r"last\.pt: a checkpoint of .*`split` neck or head"):
        trained(run, harm=lambda call: pytest.fail("trained"))
    assert not (run.folder / "last.pt").exists()


def test_each_batch_is_learned_at_the_rate_of_the_schedule(run, monkeypatch):
    rates, update = [], Optimizer.update
    monkeypatch.setattr(Optimizer, "update", lambda self, loss, rate: rates.append(rate) or update(self, loss, rate))
    trained(run)
    assert rates == pytest.approx([1e-2 * PACE.share(number, number / LAST) for number in range(LAST)])
    assert rates[0] < max(rates) > rates[-1]


def test_after_a_setback_losses_are_judged_by_the_records_that_are_left(run):
    def harm(call):
        if call == LOG_EVERY + 3:
            return math.nan
        return 1.0 if call <= 2 * LOG_EVERY else 1e4  # of all that is learned after the setback

    trained(run, harm=harm)
    assert [r["setbacks"] for r in run.records() if "diverged" in r] == [1]


def test_a_stop_at_a_batch_that_diverged_is_not_forgotten(run):
    calls = []

    def harm(call):
        calls.append(call)
        return math.nan if call == LOG_EVERY + 3 else 1.0

    with pytest.raises(KeyboardInterrupt):
        trained(run, LOG_EVERY + 2, harm=harm)
    progress = torch.load(run.folder / "last.pt")["progress"]
    assert (calls[-1], progress["number"], progress["setbacks"]) == (LOG_EVERY + 3, 0, 1)


def test_after_a_setback_at_a_checkpoint_the_next_one_is_as_far_away_as_ever(run, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def harm(call):
        clock[0] += 1
        return math.nan if call == 2 * 11 else 1.0

    trained(run, harm=harm, pace=Pace(LAST, 1e-2, 1e-2, 10.0))
    numbers = [torch.load(run.folder / name)["progress"]["number"] for name in ("last.pt", "last.1.pt", "last.2.pt")]
    assert numbers == [44, 33, 22]


def test_what_has_diverged_since_the_last_record_is_no_checkpoint(run):
    pace = Pace(LAST, 1e-2, 1e-2, 0.0)  # a checkpoint after every batch
    with pytest.raises(KeyboardInterrupt):
        trained(run, 7, harm=lambda call: math.nan if call == 6 else 1.0, pace=pace)
    assert [(r["batch"], r["diverged"]) for r in run.records() if "diverged" in r] == [(5, 6)]
