import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from detguard import DetguardError
from detguard.data.batches import Batch, PhotoSet, batches
from detguard.data.corruptions import corrupt
from detguard.data.stream import Labelled
from detguard.detections import suppress
from detguard.detectors.gated import GatedNetwork
from detguard.detectors.load import fused
from detguard.detectors.sparse import MeanSparse
from detguard.hardening.adapt import (
    FEW,
    Adaptation,
    Counts,
    adapt,
    batch_losses,
    best,
    check_growth,
    choose_mode,
    grow,
    set_aside,
)
from detguard.hardening.adversary import Adversary, perturb
from detguard.hardening.kinds import UNASKED, answers, fit_kinds
from detguard.hardening.losses import label_loss, retention_loss
from detguard.hardening.train import Setting
from detguard.hardening.validation import _run_of, hold_out
from detguard.photos import encode_png, frames_tensor
from detguard.ranks import Ranks
from detguard.runs import Run

SETTING = Setting(batch=6, size=128, save_every=1e9)
PLAN = Adaptation(photos=24, batch=6, mode="frozen", expert="whole")


@pytest.fixture(scope="module")
def old(bus, bundled):
    photo = np.ascontiguousarray(bus[::4, ::4])
    (found,) = bundled.detect([photo], 0.3)
    return PhotoSet.of([encode_png(photo)], [1.0], [Labelled(Path(), found)])


@pytest.fixture(scope="module")
def new(old):
    """The same photo, all but black."""
    return PhotoSet.of([encode_png((old.photo(0) * 0.06).astype(np.uint8))], [1.0], old.labels)


@pytest.fixture
def network(bundled_model):
    torch.manual_seed(0)
    return GatedNetwork(fused(bundled_model), split=11)


@pytest.fixture(autouse=True)
def fit_by(monkeypatch):
    """Has whom to ask be found out by so many batches: outside of tests sixteen, and two where that is not tested."""

    def chosen(count):
        for module in ("adapt", "kinds"):
            monkeypatch.setattr(f"detguard.hardening.{module}.BATCHES", count)

    chosen(2)
    return chosen


@pytest.fixture
def train(network, new, old, tmp_path):
    def run(plan=PLAN, replayed=old, on_batch=None, folder="run", of=network, **options):
        (tmp_path / folder).mkdir(exist_ok=True)
        kept = Run(tmp_path / folder, {"command": "adapt"})
        return adapt(of, {}, new, replayed, plan, SETTING, kept, on_batch, **options)

    return run


@pytest.mark.parametrize("form", ["whole", "adapter", "head"])
def test_frozen_changes_not_one_bit_of_what_there_was(network, train, new, form):
    before = copy.deepcopy(network.state_dict())
    train(replace(PLAN, expert=form, rate=3e-3))
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(after["kinds.bias"]) == 1
    with torch.no_grad():
        shown = next(batches(new, 4, 128, 9, 0, 1))
        harm = [float(label_loss(SETTING.run(network, shown.shown, i)[0], shown.labels).mean()) for i in range(4)]
    assert harm[3] < min(harm[:3]) - 0.2


def test_full_lets_all_learn(network, train):
    before = copy.deepcopy(network.state_dict())
    train(replace(PLAN, mode="full", experts=0, photos=12))  # alike in the first batch, experts teach the gate nothing
    changed = {name for name, value in before.items() if not torch.equal(network.state_dict()[name], value)}
    assert {name.split(".")[0] for name in changed} == {"trunk", "experts", "gate"}


def test_full_trains_a_new_expert_also_where_the_gate_would_not_ask_it(network, train, new):
    train(
        replace(PLAN, mode="full", rate=3e-3, photos=48, keep=0.0), replayed=new
    )  # as good as known, so it is not asked
    with torch.no_grad():
        shown = next(batches(new, 4, 128, 9, 0, 1))
        asked = float(SETTING.run(network, shown.shown)[0].gate.softmax(1)[:, 3].mean())
        harm = [float(label_loss(SETTING.run(network, shown.shown, i)[0], shown.labels).mean()) for i in range(4)]
    assert asked < 0.05
    assert harm[3] < max(harm[:3]) + 0.05  # as well as those that are asked; .2 worse where only layers before it learn


def test_full_finds_anew_whom_to_ask_when_the_robust_expert_has_learned(network, train):
    asked = []
    train(replace(PLAN, mode="full", photos=12), on_batch=lambda *_: asked.append(network.kinds.bias.item()))
    assert len(set(asked)) == 1
    assert network.kinds.bias.item() != asked[0]


def test_lambda_keeps_old_experts_what_they_were(network, train, old, new):
    frames = torch.cat([next(batches(source, 4, 128, 9, 0, 1)).shown for source in (old, new)])

    def moved(keep, folder):
        grown = copy.deepcopy(network)
        train(replace(PLAN, mode="full", experts=0, keep=keep, photos=24), folder=folder, of=grown)
        with torch.no_grad():
            return sum(
                float(retention_loss(SETTING.run(grown, frames, i)[0], SETTING.run(network, frames, i)[0]).mean())
                for i in range(3)
            )

    assert moved(30.0, "kept") < 0.7 * moved(0.0, "free")


def test_the_gate_asks_the_new_expert_about_new_photos_and_old_ones_about_the_rest(fit_by, network, train, old, new):
    fit_by(4)
    train(replace(PLAN, eps=1.0, photos=6))
    with torch.no_grad():
        shares = [network(next(batches(s, 6, 128, 5, 0, 1)).shown)[1].softmax(1)[:, 3].mean() for s in (new, old)]
    assert shares[0] > 0.5 > 0.4 > shares[1]


def test_old_photos_corrupted_as_the_new_ones_are_do_not_keep_these_from_the_new_expert(network, old, new, tmp_path):
    before = copy.deepcopy(network)
    grow(network, PLAN, new, SETTING, Run(tmp_path, {}))

    def pairs():
        for fresh, known in zip(batches(new, 6, 128, 1, 0, 2), batches(old, 6, 128, 2, 0, 2), strict=True):
            shown = torch.cat([known.clean[:1] * 0.08, known.clean[1:]])  # dark, but not too dark for what there was
            yield fresh, replace(known, shown=shown, hard=1)

    fit_kinds(network, before, pairs(), Adversary(1.0), SETTING)
    with torch.no_grad():
        shares = [network(next(batches(s, 6, 128, 5, 0, 1)).shown)[1].softmax(1)[:, 3].mean() for s in (new, old)]
    assert shares[0] > 0.7 > 0.1 > shares[1]


@pytest.mark.parametrize(
    "plan",
    [replace(PLAN, batch=2, photos=6), replace(PLAN, batch=2, mode="full", experts=0, photos=6)],
    ids=lambda plan: plan.mode,
)
def test_stopped_and_resumed_it_gives_the_same_weights(network, train, plan):
    first, second = copy.deepcopy(network), copy.deepcopy(network)
    train(plan, folder="whole")
    with pytest.raises(KeyboardInterrupt):
        train(plan, folder="stopped", of=first, on_batch=lambda number, *_: number == 1)
    train(plan, folder="stopped", of=second)
    ours, whole = second.state_dict(), network.state_dict()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_finding_whom_to_ask_tells_how_far_it_is_and_can_be_stopped(fit_by, network, train):
    fit_by(3)
    first, shares = copy.deepcopy(network), list[float]()
    with pytest.raises(KeyboardInterrupt):
        train(folder="stopped", of=first, on_fit=lambda share: share > 0.5)
    assert torch.all(first.kinds.weight == 0)
    train(replace(PLAN, photos=6), on_fit=lambda share: shares.append(share))
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.1
    assert shares[-1] == 1


def test_each_process_gets_new_photos_and_old_ones_or_says_that_there_are_too_few(network, new, old, tmp_path):
    many = replace(SETTING, ranks=Ranks(count=4))
    run = Run(tmp_path, {"command": "adapt"})
    with pytest.raises(DetguardError, match=r"`batch` 6: .* each of 4 processes needs some of both; give at least 8"):
        adapt(network, {}, new, old, replace(PLAN, mode="full"), many, run)


def test_without_replay_and_without_new_experts_it_is_plain_fine_tuning(network, train):
    before = copy.deepcopy(network.state_dict())
    train(replace(PLAN, mode="full", experts=0, keep=0.0, photos=6), replayed=None)
    assert network.names == ["normal", "hard", "adversarial"]
    assert any(not torch.equal(network.state_dict()[name], value) for name, value in before.items())


def test_it_can_be_done_again_up_to_the_limit(network, train):
    train(replace(PLAN, expert="head", photos=6))
    train(replace(PLAN, expert="head", photos=6, experts=2), folder="again")
    assert network.names[3:] == ["adapted 1", "adapted 2", "adapted 3"]
    check_growth(network, PLAN, 7)
    with pytest.raises(DetguardError, match="`max_experts` 6"):
        check_growth(network, PLAN, 6)


def test_fresh_experts_are_not_copies(network, new, tmp_path):
    grow(network, replace(PLAN, init="fresh"), new, SETTING, Run(tmp_path, {}))
    pairs = zip(network.experts[3].parameters(), network.experts[0].parameters(), strict=True)
    assert sum(not torch.allclose(a, b, atol=1e-3) for a, b in pairs) > 20


@pytest.mark.parametrize("form", ["whole", "head"])
def test_fresh_experts_take_no_thresholds_of_another_ones_channels(network, new, form, tmp_path):
    network.sparsen([next(batches(new, 2, 128, 9, 0, 1)).clean], 0.2)
    with torch.no_grad():
        network.gate.out.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    grow(network, replace(PLAN, expert=form, init="fresh"), new, SETTING, Run(tmp_path, {}))
    robust, fresh = (
        [float(m.limit.sum()) for m in network.experts[i].modules() if isinstance(m, MeanSparse)] for i in (2, 3)
    )
    assert min(robust) > 0
    assert fresh
    assert set(fresh) == {0}


def test_new_experts_begin_as_the_one_that_does_most_for_the_new_photos(network, new):
    with torch.no_grad():
        for parameter in network.experts[1].parameters():
            parameter.mul_(0.3)
        network.gate.out.bias.copy_(torch.tensor([0.0, 9.0, 3.0]))
    assert best(network, new, SETTING) == 2  # the gate would ask another, which is broken
    with torch.no_grad():
        network.gate.out.bias.copy_(torch.tensor([3.0, 9.0, 0.0]))
    assert best(network, new, SETTING) == 0


def test_resumed_new_experts_are_of_the_one_that_they_began_as(network, train, new, tmp_path):
    first, second, third = (copy.deepcopy(network) for _ in range(3))
    other = (best(network, new, SETTING) + 1) % 3
    with pytest.raises(KeyboardInterrupt):
        train(replace(PLAN, expert="head"), of=first, on_batch=lambda number, *_: number == 1)
    kept = tmp_path / "run/state/source.json"
    assert json.loads(kept.read_text()) == {"expert": (other - 1) % 3}
    kept.write_text(json.dumps({"expert": other}))
    train(replace(PLAN, expert="head"), of=second)
    assert second.shared[3].of == other
    kept.write_text(json.dumps({"expert": 3}))
    with pytest.raises(DetguardError, match=r"source.json: `expert`: .*; delete the folder"):
        train(replace(PLAN, expert="head"), of=third)


def test_where_the_robust_expert_leads_the_new_one_leads_with_it(network, train, new):
    network.fusion = "bounded:0.25"
    train(replace(PLAN, expert="adapter", rate=3e-3))
    with torch.no_grad():
        shown = next(batches(new, 4, 128, 9, 0, 1))
        harm = [float(label_loss(SETTING.run(network, shown.shown, i)[0], shown.labels).mean()) for i in (None, 2)]
    assert harm[0] < harm[1] - 0.2


def test_a_corruption_that_the_ensemble_has_not_learned_is_not_kept_from_the_new_expert(fit_by, network, old, tmp_path):
    fit_by(6)
    fog = PhotoSet.of([encode_png(corrupt(old.photo(0), "fog", 5, i)) for i in range(4)], [1.0] * 4, [*old.labels] * 4)
    setting, plan = replace(SETTING, corruptions=("fog",)), replace(PLAN, eps=1.0, photos=6)
    adapt(network, {}, fog, old, plan, setting, Run(tmp_path, {"command": "adapt"}))
    with torch.no_grad():
        asked = [network(next(batches(s, 6, 128, 5, 0, 1)).shown)[1].softmax(1)[:, 3].mean() for s in (fog, old)]
    assert asked[0] > 0.2 > 0.05 > asked[1]


def test_old_photos_are_not_led_to_new_experts_by_an_attack_that_knows_whom_the_gate_asks(
    fit_by, network, train, old, monkeypatch
):
    fit_by(2)

    def asked(rounds, sure, folder):
        monkeypatch.setattr("detguard.hardening.kinds.ROUNDS", rounds)
        monkeypatch.setattr("detguard.hardening.kinds.SURE", sure)
        grown = copy.deepcopy(network)
        train(replace(PLAN, photos=6), of=grown, folder=folder)
        torch.manual_seed(0)
        shown = next(batches(old, 4, 128, 9, 0, 1)).shown
        attacked = perturb(shown, lambda x: grown.kinds(grown.kind_features(x))[:, 0], Adversary(PLAN.eps, 10))
        with torch.no_grad():
            return float(grown(attacked)[1].softmax(1)[:, 3].max())

    knowing, blind = asked(2, 0.98, "knowing"), asked(0, 0.0, "blind")
    assert knowing < 0.5 < 0.9 < blind, (knowing, blind)


def test_new_photos_are_led_to_the_new_expert_though_attacked_known_ones_come_near_to_them(
    fit_by, network, train, old, new, monkeypatch
):
    fit_by(6)

    def asked(steepest, folder):
        monkeypatch.setattr("detguard.hardening.kinds.STEEPEST", steepest)
        grown = copy.deepcopy(network)
        train(replace(PLAN, photos=6, eps=12.0), of=grown, folder=folder)
        with torch.no_grad():
            shown = [next(batches(source, 6, 128, 5, 0, 1)).shown for source in (new, old)]
            return [float(grown(frames)[1].softmax(1)[:, 3].median()) for frames in shown]

    (gentle, _), (steep, known) = asked(0.5, "gentle"), asked(10.0, "steep")
    assert gentle < 0.85 < 0.9 < steep
    assert known < 0.01


def test_what_is_found_in_unlabelled_photos_is_what_the_detector_finds(bundled, bus):
    photo = np.ascontiguousarray(bus[::2, ::2])
    frame = frames_tensor([bundled.letterbox(photo.shape[:2])(photo)], bundled.device)
    (label,) = answers(Batch(frame, frame, 0, []), bundled.candidates(frame))
    (wanted,) = suppress(bundled.candidates(frame), 0.25, bundled.iou)
    assert len(wanted) > 2
    assert torch.equal(label.objects.boxes, wanted.boxes)
    assert torch.equal(label.objects.classes, wanted.classes)


def test_top_k_is_what_it_was_afterwards_and_leaves_no_expert_out_of_what_is_learned(network, train):
    network.top_k, told = 1, []
    train(replace(PLAN, mode="full", experts=0, photos=6), on_batch=lambda *said: told.append(said[2]["moved"]))
    assert network.top_k == 1
    assert told == [0]  # of the first batch: all answer, and are what they were


def test_the_mode_goes_by_the_number_of_new_photos():
    assert choose_mode(FEW - 1)[0] == "frozen"
    assert choose_mode(FEW)[0] == "full"
    assert str(FEW) in choose_mode(3)[1]


def test_photos_to_judge_by_are_not_trained_on():
    photos = [Labelled(Path(str(name)), None) for name in range(1000)]
    for count, most in ((1, 0), (4, 0), (11, 3), (1000, 64)):
        ((trained, judged),) = set_aside(photos[:count])
        assert most - 2 <= len(judged) <= most
        assert {one.file for one in trained} | {one.file for one in judged} == {one.file for one in photos[:count]}
        assert not {one.file for one in trained} & {one.file for one in judged}
        assert not judged or int(judged[-1].file.name) > 0.9 * (count - 1)


def test_photos_say_themselves_whether_they_judge():
    told = [Labelled(Path(str(name)), None, judges=name < 150) for name in range(300)]
    ((trained, judged),) = set_aside([*told, *(Labelled(Path(f"other-{name}"), None) for name in range(10))])
    assert [int(one.file.name) for one in judged if one.judges] == list(range(0, 150, 3))
    assert len(judged) - 50 == 2
    assert {one.file.name for one in trained if one.judges is not None} == {str(name) for name in range(150, 300)}


def test_a_photo_in_several_files_is_not_learned_from_in_one_and_judged_in_another(tmp_path):
    for number in range(12):
        for name in (f"{number}.png", f"copy-{number}.png", f"again-{number}.png"):
            (tmp_path / name).write_bytes(str(number).encode())
    copies = [
        Labelled(tmp_path / f"{name}-{n}.png", None, judges=name == "again" if n % 2 else None if n < 6 else n == 8)
        for name in ("copy", "again")
        for n in range(1, 12)
    ]
    files = [tmp_path / f"{number}.png" for number in range(12)]
    for kinds in ((copies, files), (copies[:11], files[:1] + files[6:]), (copies[1::2], copies[::2], files)):
        made = set_aside(*kinds)
        learned, judging = (
            {getattr(one, "file", one).read_bytes() for parts in made for one in parts[side]} for side in (0, 1)
        )
        assert judging
        assert learned
        assert not learned & judging
        assert sum(len(part) for parts in made for part in parts) == sum(map(len, kinds))


def test_of_samples_of_an_attack_those_of_one_photo_stay_together(tmp_path):
    (tmp_path / "samples").mkdir()
    names = [f"{number:02d}--{kind}.png" for number in range(40) for kind in ("photo", "jpeg-75", "median-3")]
    files = [tmp_path / "samples" / name for name in names]
    for file in files:
        file.write_text(file.name)
    for command, parts in (("attack", 3), ("detect", 1)):
        (tmp_path / "config.yaml").write_text(f"command: {command}\n")
        _run_of.cache_clear()
        for trained, held in (*set_aside(files), hold_out(files)):
            shared = {file.name[:2] for file in trained} & {file.name[:2] for file in held}
            assert held
            assert bool(shared) is (parts == 1)
        assert len(set_aside(files)[0][1]) == 24
    _run_of.cache_clear()


@pytest.mark.parametrize(
    "options",
    [{"mode": "frozen", "experts": 0}, {"mode": "half"}, {"expert": "arm"}, {"expert": "adapter", "init": "fresh"}],
)
def test_wrong_plans_are_refused(options):
    with pytest.raises(DetguardError, match="`"):
        Adaptation(**options)


def test_classes_that_new_photos_are_not_labelled_for_stay_what_the_ensemble_said(network, new):
    before = copy.deepcopy(network).requires_grad_(False)
    (batch,) = batches(new, 4, 128, 9, 0, 1)
    labels = [replace(one, objects=one.objects.of([0]), known=(0,)) for one in batch.labels]
    batch, plan = replace(batch, labels=labels), replace(PLAN, mode="full", experts=0, keep=0.0)
    with torch.no_grad():
        for parameter in network.experts.parameters():
            parameter.mul_(1.02)
        told = batch_losses(network, before, batch, None, Counts(4, 0, 0), plan, SETTING)
        found, said = SETTING.run(network, batch.shown)[0], SETTING.run(before, batch.clean)[0]
        alone, held = (float(label_loss(found, labels, of).mean()) for of in (None, said))
    assert held > alone + 0.01
    assert float(told["new"]) == pytest.approx(held, rel=1e-4)


def test_a_third_of_the_old_photos_is_learned_under_attack(train, monkeypatch):
    attacked = []

    def noted(frames, harm, adversary, among):
        attacked.append((len(frames), adversary.eps))
        return frames

    monkeypatch.setattr("detguard.hardening.adapt.perturb", noted)
    train(replace(PLAN, mode="full", experts=0, photos=6, eps=3.0))
    assert attacked == [(1, 3.0)]


def test_classes_that_photos_are_not_labelled_for_stay_so_in_old_photos_and_in_new_experts(network, new, old):
    before = copy.deepcopy(network).requires_grad_(False)
    network.grow(["adapted 1"], 2)
    pair = [next(batches(source, 2, 128, 9, 0, 1)) for source in (new, old)]
    fresh, known = (
        replace(batch, labels=[replace(one, objects=one.objects.of([0]), known=(0,)) for one in batch.labels])
        for batch in pair
    )
    with torch.no_grad():
        for parameter in network.experts.parameters():
            parameter.mul_(1.02)
        plan = replace(PLAN, mode="full", keep=0.0)
        told = batch_losses(network, before, fresh, known, Counts(2, 2, 0), plan, SETTING)
        for name, batch, route in (("new, grown", fresh, 3), ("old", known, None)):
            found, said = SETTING.run(network, batch.shown, route)[0], SETTING.run(before, batch.clean)[0]
            alone, held = (float(label_loss(found, batch.labels, of).mean()) for of in (None, said))
            assert held > alone + 0.01
            assert float(told[name]) == pytest.approx(held, rel=1e-4)


def test_several_new_experts_are_asked_a_little_differently(network, new):
    before = copy.deepcopy(network)
    network.grow(["adapted 1", "adapted 2"], 2, "head")
    fit_kinds(network, before, [(next(batches(new, 4, 128, 9, 0, 1)), None)], Adversary(), SETTING)
    first, second = network.kinds.weight
    assert 0.05 < (first - second).std() / (first + second).std() < 0.1


def test_known_photos_leave_a_new_expert_unasked_also_where_an_earlier_one_is_asked(network, new, old):
    network.grow(["adapted 1"], 2, "head")
    with torch.no_grad():
        network.kinds.bias.fill_(10.0)
    before = copy.deepcopy(network)
    network.grow(["adapted 2"], 2, "head")
    alike = PhotoSet.of([encode_png((old.photo(0) * 0.062).astype(np.uint8))], [1.0], old.labels)
    fresh, known = (next(batches(source, 4, 128, 9, 0, 1)) for source in (new, alike))
    fit_kinds(network, before, [(fresh, known)], Adversary(0.0), SETTING)
    with torch.no_grad():
        of_new, of_known = (network(batch.shown)[1].softmax(1)[:, 4] for batch in (fresh, known))
    assert of_new.median() > 0.9
    assert of_known.max() < math.exp(-UNASKED)
