"""What a run asks of torch for its device, and gives back at its end."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fss import FewShotSegmenter, processes
from fss.models import Baseline, build_backbone
from fss.processes import (
    build_fabric,
    determinism,
    fixed_shapes,
    float32_products,
    lay_out,
    synchronize_batch_norms,
    takes_channels_last,
    torchrun_layout,
)
from fss.runs.checkpoint import read_checkpoint, write_checkpoint
from fss.training.run import train
from fss.training.trainer import Trainer

CONVOLUTIONS, MATRICES = torch.backends.cudnn.conv, torch.backends.cuda.matmul


def is_channels_last(weight: torch.Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


@pytest.fixture
def as_on_gpu(monkeypatch) -> None:
    """The decision that a GPU would bring about, for the CPU."""
    monkeypatch.setattr(processes, "takes_channels_last", lambda device: True)


def test_networks_of_a_gpu_lie_in_channels_last():
    assert takes_channels_last(torch.device("cuda", 1))
    assert not takes_channels_last(torch.device("cpu"))
    network = build_backbone("resnet18", width=4)
    before = copy.deepcopy(network.state_dict())
    assert lay_out(network, torch.device("cpu")) is network
    assert network.layer1[0].conv1.weight.is_contiguous()
    lay_out(network, torch.device("cuda"))
    assert is_channels_last(network.layer1[0].conv1.weight)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_every_network_is_laid_out(tiny, as_on_gpu):
    config = tiny()
    trainer = Trainer(config, build_fabric(config))
    for name in (
        "backbone.layer1.0.conv1.weight",
        "backbone.layer2.0.conv1.V",
        "residual.0.weight",
    ):
        assert is_channels_last(trainer.network.state_dict()[name]), name
    assert is_channels_last(FewShotSegmenter().model.backbone.layer1[0].conv1.weight)


@pytest.mark.parametrize("wanted", [False, True])
def test_cudnn_times_its_algorithms_for_fixed_shapes_alone(wanted):
    cudnn = torch.backends.cudnn
    assert not cudnn.benchmark
    with pytest.raises(KeyError), fixed_shapes(wanted):
        assert cudnn.benchmark is wanted
        with fixed_shapes(False):
            assert not cudnn.benchmark
        assert cudnn.benchmark is wanted
        raise KeyError
    assert not cudnn.benchmark
    with determinism(True), fixed_shapes():
        assert not cudnn.benchmark


@pytest.mark.parametrize("cache", [0.0, 1.0])
def test_training_has_fixed_shapes_and_evaluation_without_kept_features(tiny, monkeypatch, cache):
    seen: dict[str, set[bool]] = {"train": set(), "eval": set()}
    original = Baseline.head

    def noted(self, *arguments):
        seen["train" if self.training else "eval"].add(torch.backends.cudnn.benchmark)
        return original(self, *arguments)

    monkeypatch.setattr(Baseline, "head", noted)
    train(tiny(feature_cache=cache, steps=1))
    assert seen == {"train": {True}, "eval": {not cache}}


@pytest.mark.parametrize(
    ("tf32", "convolutions", "matrices"),
    [("none", "ieee", "ieee"), ("convolutions", "tf32", "ieee"), ("all", "tf32", "tf32")],
)
def test_tf32_of_a_run_and_after_it(tiny, monkeypatch, tf32, convolutions, matrices):
    before = CONVOLUTIONS.fp32_precision, MATRICES.fp32_precision
    original = Trainer._loss
    seen = []

    def noted(self, batch):
        seen.append((CONVOLUTIONS.fp32_precision, MATRICES.fp32_precision))
        return original(self, batch)

    monkeypatch.setattr(Trainer, "_loss", noted)
    train(tiny(tf32=tf32, steps=1))
    assert seen == [(convolutions, matrices)]
    assert (CONVOLUTIONS.fp32_precision, MATRICES.fp32_precision) == before
    # Fabric asks this of a GPU whenever a run begins; it raises where switches contradict
    assert torch.get_float32_matmul_precision() == "highest"


def test_tf32_is_undone_after_an_error():
    before = CONVOLUTIONS.fp32_precision, MATRICES.fp32_precision
    with pytest.raises(KeyError), float32_products("all"):
        raise KeyError
    assert (CONVOLUTIONS.fp32_precision, MATRICES.fp32_precision) == before


def test_a_checkpoint_has_torchs_own_memory_format(tmp_path):
    network = build_backbone("resnet18", width=4).to(memory_format=torch.channels_last)
    state = network.state_dict()
    write_checkpoint(tmp_path / "x.pt", {"model": state, "optimizer": {"state": {0: state}}})
    content = read_checkpoint(tmp_path / "x.pt")
    for read in (content["model"], content["optimizer"]["state"][0]):
        for name, value in state.items():
            assert torch.equal(read[name], value)
            assert read[name].is_contiguous(), name
    assert is_channels_last(state["layer1.0.conv1.weight"])  # what is written stays as it was
    assert content["model"]._metadata == state._metadata


def test_a_run_of_a_gpu_is_read_and_resumed_anywhere(tiny, monkeypatch):
    """Momentum lies as its parameter does, in whichever format the run goes on."""
    config = tiny(steps=2, save_every=1, optimizer={"schedule": "constant"})
    with monkeypatch.context() as patch:
        patch.setattr(processes, "takes_channels_last", lambda device: True)
        train(config)
    state = read_checkpoint(Path(config.out) / "last.pt")
    for laid_out in (False, True):
        monkeypatch.setattr(
            processes, "takes_channels_last", lambda device, answer=laid_out: answer
        )
        trainer = Trainer(config, build_fabric(config))
        trainer.restore(copy.deepcopy(state))
        momenta = trainer.optimizer.optimizer.state
        kinds = [(p.stride(), momenta[p]["momentum_buffer"].stride()) for p in momenta]
        assert kinds and all(one == other for one, other in kinds)
        assert trainer.network.residual[0].weight.is_contiguous() is not laid_out


def test_determinism_is_on_within_and_restored_after(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(KeyError), determinism(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    with determinism(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_synchronized_batch_norms_on_gpus(tiny):
    class Two:
        device, world_size = torch.device("cuda"), 2

    regime = tiny(regime={"batch_norm": "both", "batch_norm_statistics": "batch"}).regime
    model = synchronize_batch_norms(nn.Sequential(nn.BatchNorm2d(3)), regime, Two())
    assert isinstance(model[0], nn.SyncBatchNorm)


def test_the_layout_of_torchrun(monkeypatch):
    assert torchrun_layout() is None
    for name, value in (("RUN_ID", "x"),):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert torchrun_layout() == (4, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="torchrun: expected as many processes on each machine"):
        torchrun_layout()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")
def test_a_gpu_that_is_not_there(tiny):
    with pytest.raises(ValueError, match="accelerator: expected a GPU for cuda, found none"):
        train(tiny(accelerator="cuda"))


SBATCH = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "job", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    "environment",
    [
        SBATCH,
        SBATCH | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS_PER_NODE": "4"},
        {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"},
        {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "gone", "JSM_NAMESPACE_SIZE": "1"}
        | {"JSM_NAMESPACE_LOCAL_RANK": "0"},
        {"MASTER_ADDR": "host", "WORLD_SIZE": "1", "RANK": "0"},
    ],
)
def test_variables_of_a_job_start_no_processes(tiny, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fabric = build_fabric(tiny())
    assert fabric.world_size == 1 and fabric.is_global_zero


@pytest.mark.parametrize(
    ("environment", "starter"),
    [
        (
            SBATCH | {"SLURM_STEP_NUM_TASKS": "4"},
            "srun started 4 processes",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes"),
        ({"PMI_SIZE": "2"}, "mpiexec started 2 processes"),
        ({"RANK": "1", "WORLD_SIZE": "8"}, "another launcher started 8 processes"),
    ],
)
def test_processes_of_another_launcher_are_refused(tiny, monkeypatch, environment, starter):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=starter + ".*torchrun --nproc-per-node"):
        build_fabric(tiny())
