"""The machine under a run: its device and dtype, memory, the other ranks, and signals."""

import contextlib
import ctypes
import math
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  imported after a group is made, it keeps that group and its threads for ever

from configurator import first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of a --device key; auto is cuda, then mps, then cpu. Raises ValueError if this machine lacks it."""
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if counts[kind])
    kind, _, index = name.partition(":")
    if kind not in counts or (index and not index.isdigit()):
        raise ValueError(f"--device={name}: choose auto, cpu, cuda, cuda:1 or mps")
    if int(index or 0) >= counts[kind]:
        raise ValueError(f"--device={name}: this machine has {counts[kind]} {kind} devices (torch {torch.__version__})")
    return torch.device(name)


def pick_own_device(name: str) -> torch.device:
    """The same, and under torchrun this rank's own GPU, which becomes the current one. Raises ValueError as pick_device."""
    on = pick_device(name)
    if on.type == "cuda":
        on = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', on.index or 0)}")
        torch.cuda.set_device(on)
    return on


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a --dtype key; auto is bfloat16 where the device has it, float16 on older GPUs, else float32.

    Raises ValueError for another name.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ValueError(f"--dtype={name}: choose auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


# Dense bf16 (fp16 where bf16 is missing) matrix peak in TFLOP/s, from the vendors' datasheets, without sparsity.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "A40": 150, "A10G": 70, "L40S": 362, "L4": 121,
    "RTX 6000 Ada": 364, "RTX A6000": 155, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a GPU by its name, or None where it is not in the table."""
    return next((1e12 * peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


def peak_memory(on: torch.device) -> float | None:
    """MiB: of the GPU's allocator (a Mac's: what it holds now), or resident on a CPU; None where the system does not say."""
    if on.type == "cuda":
        return torch.cuda.max_memory_allocated(on) / 2**20
    if on.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 2**20 if sys.platform == "darwin" else size / 2**10


def free_memory(on: torch.device) -> float:
    """MiB that this process may have: of the GPU what is free or its own, else of the machine what is available."""
    if on.type == "mps":
        return torch.mps.recommended_max_memory() / 2**20
    if on.type == "cuda":
        return (torch.cuda.mem_get_info(on)[0] + torch.cuda.memory_reserved(on)) / 2**20
    if Path("/proc/meminfo").exists():
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 1024
        limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
        limits = [int(p.read_text()) / 2**20 for p in limits if p.exists() and p.read_text().strip().isdigit()]
        return min(available / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) + (peak_memory(on) or 0), *limits, math.inf)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**21 if hasattr(os, "sysconf") else 4096.0


def largest_batch(
    model, total_batch_tokens: int, block_size: int, on: torch.device, kind: torch.dtype, world: int
) -> int:
    """The largest micro-batch that fits in memory and divides the sequences of a step over the ranks.

    Measured by a forward and a backward pass of one sequence and of three. Raises ValueError if not even one fits.
    """
    sequences, rest = divmod(total_batch_tokens, block_size * world)
    if rest or not sequences:
        raise ValueError(
            f"--total_batch_tokens={total_batch_tokens} is not a multiple of block_size x ranks = {block_size} x {world}"
        )
    peaks = []
    for rows in (1, 3):
        try:
            peaks.append(peak_of(model, rows, block_size, on, kind))
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            peaks.append(math.inf)
    a_sequence = max((peaks[1] - peaks[0]) / 2, 1e-3) if peaks[0] < math.inf else math.inf
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    fits = torch.tensor(1.0 if peaks[0] < math.inf else 0.0)
    if peaks[1] < math.inf:
        later = 2 * weights + (weights if world > 1 else 0)  # the optimizer's state, DDP's buckets
        base = peaks[0] - a_sequence + later
        fits = torch.tensor(float(int((0.9 * free_memory(on) - base) / a_sequence)))
    if world > 1:
        dist.all_reduce(fits, dist.ReduceOp.MIN)  # gloo's, on the CPU
    if fits < 1:
        raise ValueError(
            f"--batch_size=auto: not even one sequence of {block_size} fits: a smaller --block_size or model, or "
            "--activation_checkpointing=True"
        )
    return max(d for d in range(1, sequences + 1) if sequences % d == 0 and d <= fits)


def peak_of(model, rows: int, block_size: int, on: torch.device, kind: torch.dtype) -> float:
    """MiB at the peak of a forward and a backward pass of so many sequences."""
    x = torch.zeros(rows, block_size, dtype=torch.long, device=on)
    try:
        with contextlib.nullcontext() if kind == torch.float32 else torch.autocast(on.type, kind):
            _, loss = model(x, x, return_logits=False)
        loss.backward()
        return peak_memory(on) or 0.0
    finally:
        model.zero_grad(set_to_none=True)


def read_later(numbers: torch.Tensor):
    """A function that returns the numbers as a list, and waits for no more than the device has to do until now."""
    if numbers.device.type != "cuda":
        found = numbers.tolist()
        return lambda: found
    host = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def read() -> list[float]:
        done.synchronize()
        return host.tolist()

    return read


def join_ranks(on: torch.device, backend: str, timeout: float) -> tuple[int, int]:
    """This process's rank and the world size that torchrun gave it, (0, 1) without; the ranks are joined and greet.

    timeout: seconds that a rank waits for the others, here and later. Raises RuntimeError if they do not find together.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" in os.environ:
        backends = f"cpu:gloo,cuda:{backend}" if on.type == "cuda" else "gloo"
        wait, store = timedelta(seconds=timeout), None
        try:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it keeps the addresses of before a restart
                store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, False, wait)
                store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            ranks = {"store": store, "rank": rank, "world_size": world} if store else {}
            dist.init_process_group(backends, timeout=wait, **ranks)
            greet(on, rank, world)
        except (dist.DistError, RuntimeError) as e:
            raise RuntimeError(
                f"rank {rank} of {world}: the ranks do not find together ({first_line(e)}); see that all are started, that "
                "MASTER_ADDR is reached from every host, and NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME; --timeout waits longer"
            ) from None
    return rank, world


def from_first_rank(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def leave_ranks() -> None:
    """Wait for the other ranks, and let go of them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def greet(on: torch.device, rank: int, world: int) -> None:
    """All ranks add up 16 MiB a few times: says who is there and how fast they talk, or fails now and not in an hour."""
    names = [""] * world
    dist.all_gather_object(names, socket.gethostname())
    numbers, times = torch.ones(2**22, device=on), []
    for _ in range(4):  # the first opens the connections
        start = time.perf_counter()
        dist.all_reduce(numbers)
        total = numbers[-1].item()  # waits for the device
        times.append(time.perf_counter() - start)
    if total != world**4:
        raise RuntimeError(f"the ranks add up wrongly: {total} instead of {world**4}")
    moved = 2 * (world - 1) / world * 4 * numbers.numel()  # bytes each rank sends in a ring
    if rank == 0:
        hosts = ", ".join(f"{n} on {name}" for name, n in Counter(names).items())
        print(f"ranks: {world} ({hosts}), all-reduce {moved / min(times) / 1e9:.2f} GB/s a rank")


def tune_malloc() -> None:
    """On a CPU with glibc, large tensors get memory that was freed before, and the first of it on huge pages.

    As it comes, malloc maps every large tensor anew and the kernel zeroes its pages: a sixth of a training step; and
    reading weights in pages of 4 KiB costs a tenth of decoding (BENCHMARKS.md). Nothing is taken before it is used.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError, RuntimeError):  # musl, macOS, Windows, a limit
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        room = torch.empty(1900 * 2**20, dtype=torch.uint8)  # goes back when this returns, still marked
        begin, size = -(-room.data_ptr() // 2**21) * 2**21, 1898 * 2**20
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), 14)  # MADV_HUGEPAGE


def is_out_of_memory(e: Exception) -> bool:
    words = ("allocate memory", "out of memory")
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or any(w in str(e) for w in words)


class Signals:
    """In training, SIGTERM, SIGINT and SIGUSR1 ask for an end after the step; `number` is the one that came, or 0.

    Before and after it they end the process at once, as does a second Ctrl-C, a second or more after the first. What is
    being written then has another name until it is whole. A shell sees 128 + the signal as the exit code.
    """

    names = [n for n in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, n)]  # Windows has no SIGUSR1

    def __init__(self):
        self.number, self.at = 0, 0.0
        self.catch(False)

    def catch(self, training: bool) -> None:
        for name in self.names:
            signal.signal(getattr(signal, name), self.receive if training else signal.SIG_DFL)

    def receive(self, number: int, frame) -> None:
        if not self.number:
            self.number, self.at = number, time.monotonic()
            os.write(2, f"\n{signal.Signals(number).name}: finishing the step and saving\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self.at > 1:
            os._exit(128 + number)
