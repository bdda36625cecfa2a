"""The processes of a run: devices, memory format, precision, torchrun, determinism."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import distributed, nn

from fss.config import RegimeConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Network = TypeVar("Network", bound=nn.Module)

# Who started how many processes, by the variable that holds their number; the first one counts.
_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",  # within a batch script, without srun, there is no step
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "JSM_NAMESPACE_SIZE": "jsrun",
    "PMI_SIZE": "mpiexec",
}


class Launched(Protocol):
    """What a configuration says about the processes of its run."""

    accelerator: str
    devices: int | str
    precision: str
    batch_size: int
    accumulate: int


def build_fabric(config: Launched) -> Fabric:
    """Launch the processes of a run on its devices; under torchrun, join its processes.

    Raises:
        ValueError: devices that this machine lacks; a batch that cannot be shared evenly.
    """
    devices, nodes = _layout(config)
    fabric = launch(config.accelerator, devices, nodes, config.precision)
    if config.batch_size % (fabric.world_size * config.accumulate):
        parts = f" in {config.accumulate} parts (accumulate)" if config.accumulate > 1 else ""
        raise ValueError(
            f"batch_size: expected a multiple of the {fabric.world_size} processes{parts}, "
            f"got {config.batch_size}"
        )
    return fabric


def launch(accelerator: str, devices: int | str, nodes: int, precision: Any) -> Fabric:
    """Launch the processes.

    Fabric is told who started them, torchrun or it: by itself it also takes variables of Slurm and
    MPI for a launcher, which a job leaves in the environment of every program.

    Raises:
        ValueError: devices that this machine lacks; processes that another launcher started.
    """
    # Here, as they take 2 s: listing runs and segmenting pictures need none of them.
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision
    from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
    from lightning_fabric.strategies import DDPStrategy

    _refuse_other_launchers()
    gpus = torch.cuda.device_count()
    if accelerator == "cuda" and not gpus:
        raise ValueError("accelerator: expected a GPU for cuda, found none; set accelerator to cpu")
    on_gpu = accelerator != "cpu" and gpus > 0
    if on_gpu and isinstance(devices, int) and devices > gpus:
        raise ValueError(f"devices: expected at most {gpus}, the GPUs here; got {devices}")
    starter = LightningEnvironment if torchrun_layout() is None else TorchElasticEnvironment
    options: dict[str, Any] = {"plugins": [starter()], "precision": precision}
    if precision == "16-mixed" and not on_gpu:
        # Fabric would take bfloat16 instead.
        options = {"plugins": [starter(), MixedPrecision("16-mixed", "cpu")]}
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        # The only buffers are frozen; broadcasting them every step would cost more than S.
        strategy="auto" if devices == nodes == 1 else DDPStrategy(broadcast_buffers=False),
        **options,
    )
    if is_restart():
        _connect_anew("nccl" if on_gpu else "gloo")
    fabric.launch()
    return fabric


def _refuse_other_launchers() -> None:
    """Refuse processes that know nothing of each other: each would train alone, in one folder."""
    if torchrun_layout() is not None:
        return
    started = {each: os.environ.get(each, "1") for each in _LAUNCHERS}
    if "RANK" in os.environ:  # Kubernetes, DeepSpeed; Fabric sets WORLD_SIZE alone
        started["WORLD_SIZE"] = os.environ.get("WORLD_SIZE", "1")
    for variable, count in started.items():
        if count.isdecimal() and int(count) > 1:
            raise ValueError(
                f"{_LAUNCHERS.get(variable, 'another launcher')} started {count} processes "
                f"({variable}={count}), and only torchrun's know of each other; start one process "
                f"a machine, `torchrun --nproc-per-node GPUS -m fss.cli …`, or unset {variable}"
            )


def torchrun_layout() -> tuple[int, int] | None:
    """Return torchrun's processes per machine and number of machines; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if world % local:
        raise ValueError(
            f"torchrun: expected as many processes on each machine, got {world} in all and {local} "
            "on this one; give --nproc-per-node the same number everywhere"
        )
    return local, world // local


def is_restart() -> bool:
    """Return whether torchrun started these processes again after others had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def _connect_anew(backend: str) -> None:
    """Connect restarted processes, before Fabric would.

    torchrun's agent serves one key-value store across restarts, which still holds the addresses of
    the dead processes: each restart needs its own keys.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or distributed.is_initialized():
        return  # connected already: by an earlier run of a table in this process
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    life = f"life {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    distributed.init_process_group(
        backend,
        store=distributed.PrefixStore(life, distributed.TCPStore(address, port)),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def _layout(config: Launched) -> tuple[int | str, int]:
    layout = torchrun_layout()
    if layout is None:
        return config.devices, 1
    if config.devices not in ("auto", 1, layout[0]):
        raise ValueError(
            f"devices: torchrun started {layout[0]} processes on this machine, devices is "
            f"{config.devices}; omit it"
        )
    return layout


def synchronize_batch_norms(model: nn.Module, regime: RegimeConfig, fabric: Fabric) -> nn.Module:
    """Make batch norms use statistics over the batches of all processes.

    Raises:
        ValueError: if no batch norm uses batch statistics, in a single process, or on a CPU, where
            torch has no synchronized batch norm.
    """
    if regime.batch_norm_statistics != "batch":
        raise ValueError(
            "sync_batch_norm: every batch norm uses its stored statistics, which are the same in "
            "all processes; omit it, or set regime.batch_norm_statistics to batch"
        )
    if fabric.device.type != "cuda" or fabric.world_size == 1:
        kind = "GPU" if fabric.device.type == "cuda" else fabric.device.type.upper()
        raise ValueError(
            "sync_batch_norm: expected several processes on GPUs, torch synchronizes batch norms "
            f"only there; got {fabric.world_size} on {kind}. Omit it"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Let torch use only deterministic algorithms, or raise; undone at the end.

    cuBLAS needs its workspace fixed before its first use in the process.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn = torch.backends.cudnn
    former = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(former[0], warn_only=former[1])
        cudnn.deterministic, cudnn.benchmark = former[2:]


def takes_channels_last(device: torch.device) -> bool:
    """Return whether networks run in channels_last on a device: on a GPU.

    The fused GPU kernels take nothing else, and cuDNN transposes around 16-bit convolutions of
    other maps. On a CPU neither format is faster for all shapes.
    """
    return device.type == "cuda"


def lay_out(network: Network, device: torch.device) -> Network:
    """Give a network's kernels the memory format for a device, in place; values stay.

    Feature maps take the format of the kernels, from the first convolution on.
    """
    if takes_channels_last(device):
        network.to(memory_format=torch.channels_last)
    return network


@contextmanager
def fixed_shapes(fixed: bool = True) -> Iterator[None]:
    """Let cuDNN time its algorithms once for each shape of a convolution; undone at the end.

    Args:
        fixed: the same shapes recur; if not, timing costs more than it gains. Within `determinism`
            nothing is timed: the choice could differ each time.
    """
    cudnn = torch.backends.cudnn
    former = cudnn.benchmark
    cudnn.benchmark = fixed and not cudnn.deterministic
    try:
        yield
    finally:
        cudnn.benchmark = former


@contextmanager
def float32_products(tf32: Literal["none", "convolutions", "all"]) -> Iterator[None]:
    """Set which float32 products of a GPU round to TF32, see `TrainConfig`; undone at the end."""
    # not `allow_tf32`: reading it raises once `fp32_precision` has been set
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    matrices: Any = torch.backends.cuda.matmul
    former = convolutions.fp32_precision, matrices.fp32_precision
    convolutions.fp32_precision = "ieee" if tf32 == "none" else "tf32"
    matrices.fp32_precision = "tf32" if tf32 == "all" else "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision, matrices.fp32_precision = former
