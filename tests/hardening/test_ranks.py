"""Several processes that train together: they end where one process ends on the same batches."""

import math
import multiprocessing
import os
import pickle
import socket

import pytest
import torch
from ranked import train, train_as

import detguard.data.batches as module
from detguard import DetguardError
from detguard.data.batches import read_photos
from detguard.hardening.run import measured_frames
from detguard.hardening.train import Setting
from detguard.ranks import ALONE, Ranks


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What one process ends at, and what two do."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["detguard.workflows.harden", "accelerate"])
    ranks = [environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [context.Process(target=train_as, args=(rank, folder / "two.pt")) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    return train(ALONE, folder), torch.load(folder / "two.pt")


@pytest.mark.parametrize("stage", ["adversarial", "joint", "pgd", "adapt"])
def test_two_processes_end_where_one_does(trained, stage):
    start, alone, two = (found[stage] for found in (trained[0]["start"], *(one["weights"] for one in trained)))
    assert two.keys() == alone.keys()
    apart, moved = (
        math.sqrt(sum(float((alone[name] - other[name]).square().sum()) for name in alone)) for other in (two, start)
    )
    assert apart < 0.01 * moved


@pytest.mark.parametrize("stage", ["adversarial", "joint", "pgd"])
def test_losses_are_told_of_all_processes(trained, stage):
    alone, two = (found["losses"][stage] for found in trained)
    assert alone.keys() == two.keys()
    for name, value in alone.items():
        assert two[name] == pytest.approx(value, rel=0.01, abs=2e-4), name


def test_a_photo_that_some_processes_cannot_read_is_told(trained):
    assert trained[1]["refused"] == "a.jpg: damaged: read by some processes only; see that all can read the same files"


def test_a_process_can_train_again(trained):
    assert trained[1]["trained again"] == 2


def test_what_a_launcher_gives_must_be_numbers(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(DetguardError, match="WORLD_SIZE=two in the environment: expected a number"):
        Ranks.start("cpu")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert Ranks.start("cpu").count == 1


@pytest.mark.parametrize("left", [{}, {"RANK": "0", "LOCAL_RANK": "0"}], ids=["nothing", "ranks"])
def test_a_count_of_processes_that_nothing_started_is_one_line(left, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"WORLD_SIZE": "2"} | left).items():
        monkeypatch.setenv(name, value)
    missing = "MASTER_ADDR, MASTER_PORT" if left else "RANK, MASTER_ADDR, MASTER_PORT"
    with pytest.raises(DetguardError, match=rf"WORLD_SIZE=2.*without {missing}: .*torchrun or accelerate.*or unset"):
        Ranks.start("cpu")


def test_every_frame_of_a_batch_is_that_of_one_process():
    ranks = [Ranks(rank=rank, count=3) for rank in range(3)]
    assert sorted(row for one in ranks for row in one.rows(2, 9)) == list(range(2, 9))
    assert {row % 3 for row in ranks[1].rows(2, 9)} == {1}


def test_workers_that_are_not_forks_are_sent_no_group(bus_file, monkeypatch):
    sent = []
    monkeypatch.setattr(module, "ahead", lambda maker, *rest, **options: sent.append(maker) or iter(()))
    source = read_photos([([bus_file], 1.0)], 64)[0]
    assert not list(module.batches(source, 2, 64, 0, 0, 1, ranks=Ranks(count=2, control=socket.socket())))
    assert pickle.loads(pickle.dumps(sent[0])).ranks == Ranks(count=2)


def test_channels_are_measured_by_the_frames_of_one_process(bus_file):
    source = read_photos([([bus_file, bus_file.with_name("zidane.jpg")], 1.0)], 64)[0]
    one, three = (torch.cat(list(measured_frames(source, Setting(5, 64, ranks=Ranks(count=n))))) for n in (1, 3))
    assert len(one) == len(three)
    assert all(any(torch.equal(frame, other) for other in one) for frame in three)
    assert not torch.equal(one, three)
