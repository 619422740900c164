"""Device and dtype, the ranks of torchrun, the numbers of a step, signals, explained errors."""

import contextlib
import math
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from datetime import timedelta
from typing import NamedTuple

from configurator import UserError, check_choice, first_line

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  must come before init_process_group: imported later, it keeps the group alive

# -----------------------------------------------------------------------------
# Device and dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pick_device(name: str) -> torch.device:
    """The device of a --device key; auto is cuda, then mps, then cpu. Raises UserError if this machine lacks it."""
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if counts[kind])
    kind, _, index = name.partition(":")
    if kind not in counts or (index and not index.isdigit()):
        raise UserError(f"--device={name}: choose auto, cpu, cuda, cuda:1 or mps")
    if int(index or 0) >= counts[kind]:
        raise UserError(f"--device={name}: this machine has {counts[kind]} {kind} devices (torch {torch.__version__})")
    return torch.device(name)


def pick_local_device(name: str) -> torch.device:
    """pick_device, and under torchrun this rank's own GPU, which becomes the current one."""
    device = pick_device(name)
    if device.type == "cuda":
        device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', device.index or 0)}")
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device, writing=False) -> torch.dtype:
    """The dtype of a --dtype key; auto is bfloat16 where it is fast, float16 on older GPUs, otherwise float32.

    On a CPU products are faster in bfloat16 with AMX, and with AVX-512's instruction for it on AMD; Intel's runs at half the
    rate of float32 (BENCHMARKS.md). writing: one token at a time, which is faster in bfloat16 with either, as memory decides.
    """
    check_choice("dtype", name, ("auto", *DTYPES))
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type != "cpu":
        return torch.float32
    cpu_name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")  # from torch 2.12 on
    fast = torch.cpu._is_avx512_bf16_supported() and (writing or "Intel" not in cpu_name)
    return torch.bfloat16 if fast or torch.cpu._is_amx_tile_supported() else torch.float32


def autocast(device: torch.device, dtype: torch.dtype):
    """A context in which matrix products run in dtype."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def keep_dynamo_out() -> None:
    """Let optimizers work without torch._dynamo, whose import takes nearly as long as torch's own (BENCHMARKS.md).

    torch's optimizers import it to keep themselves out of compiled code, where train.py never puts them. torch has no switch
    for this, so their methods are replaced by those they wrap; where torch changes these, they stay as they are.
    torch.compile, DDP and activation checkpointing still import it.
    """
    if "torch._dynamo" in sys.modules:
        return
    for method in vars(torch.optim.Optimizer).values():
        if inner := getattr(method, "__wrapped__", None):
            inner.__dynamo_disable = inner  # what torch._compile._disable_dynamo calls instead of the method
    for each in vars(torch.optim).values():
        step = vars(each).get("step") if isinstance(each, type) else None
        if getattr(getattr(step, "__code__", None), "co_name", "") == "_use_grad":  # no_grad, and the import
            each.step = torch.no_grad()(step.__wrapped__)


def to_device(device: torch.device, *arrays) -> list[torch.Tensor]:
    """numpy arrays as tensors on the device, without waiting for a GPU."""
    tensors = [torch.from_numpy(a) for a in arrays]
    if device.type == "cuda":  # from pinned memory the copy is asynchronous
        return [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return [t.to(device) for t in tensors]


def synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device is not None and device.type == "mps":
        torch.mps.synchronize()


# Dense bf16 (fp16 where bf16 is missing) matrix peak in TFLOP/s without sparsity, from the vendors' datasheets.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "A40": 150, "A10G": 70, "L40S": 362, "L4": 121,
    "RTX 6000 Ada": 364, "RTX A6000": 155, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip


def peak_flops(device: torch.device, tflops: float = 0.0) -> float | None:
    """Peak FLOP/s of a device: as given by --peak_tflops, or by the GPU's name; None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return tflops * 1e12 or peak_flops_of(name)


def peak_flops_of(name: str) -> float | None:
    return next((1e12 * peak for gpu, peak in PEAK_TFLOPS.items() if re.search(rf"\b{gpu}\b", name)), None)


def flops_per_token(model, T: int, convention: str = "palm") -> float:
    """Floating-point operations to train a GPT on one token at context T (forward and backward; a multiply-add is two).

    palm: 6 N + 12 L H D T, N all parameters but positions (https://arxiv.org/abs/2204.02311, appendix B), as nanoGPT.
    causal: matrix products only, with attention over the (T + 1) / 2 keys that a causal query sees on average.
    """
    c = model.config
    attention = 12 * c.n_layer * c.n_head * c.head_size
    if convention == "palm":
        weights = sum(p.numel() for name, p in model.named_parameters() if name != "transformer.wpe.weight")
        return 6 * weights + attention * T
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name)
    return 6 * (matrices + c.padded_vocab_size * c.n_embd) + attention * (T + 1) / 2


def peak_memory(device: torch.device) -> float | None:
    """Peak memory in MiB: of the GPU's allocator (on a Mac: its present size), or resident on a CPU; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 2**20 if sys.platform == "darwin" else size / 2**10


def is_out_of_memory(e: Exception) -> bool:
    words = ("allocate memory", "out of memory")
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or any(w in str(e) for w in words)


# -----------------------------------------------------------------------------
# Ranks


def init_distributed(device: torch.device, backend: str, timeout: float) -> tuple[int, int]:
    """Join the ranks that torchrun started; returns (rank, world size), (0, 1) without torchrun.

    timeout: seconds to wait for the other ranks, now and in every later exchange. Raises UserError if they do not connect.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" not in os.environ:
        return rank, world_size
    backends = f"cpu:gloo,cuda:{backend}" if device.type == "cuda" else "gloo"
    wait, options = timedelta(seconds=timeout), {}
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # After a restart torchrun's store still has the old addresses of the ranks: a prefix per attempt separates them.
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, False, wait)
            store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            options = {"store": store, "rank": rank, "world_size": world_size}
        dist.init_process_group(backends, timeout=wait, **options)
        check_all_reduce(device, rank, world_size)
    except (dist.DistError, RuntimeError) as e:
        raise UserError(
            f"rank {rank} of {world_size}: the ranks cannot connect ({first_line(e)}). Check that all are running, that every "
            "host reaches MASTER_ADDR, and NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME; --timeout waits longer"
        ) from None
    return rank, world_size


def check_all_reduce(device: torch.device, rank: int, world_size: int) -> None:
    """Sum 16 MiB over the ranks a few times and print who takes part and how fast: a bad network fails now, not in an hour."""
    hosts = [""] * world_size
    dist.all_gather_object(hosts, socket.gethostname())
    numbers, seconds = torch.ones(2**22, device=device), []
    for _ in range(4):  # the first also opens the connections
        numbers.fill_(1)
        synchronize(device)
        start = time.perf_counter()
        dist.all_reduce(numbers)
        total = numbers[-1].item()  # syncs
        seconds.append(time.perf_counter() - start)
        if total != world_size:
            raise RuntimeError(f"all-reduce is wrong: {total} instead of {world_size}")
    sent = 2 * (world_size - 1) / world_size * 4 * numbers.numel()  # bytes each rank sends in a ring
    if rank == 0:
        counts = ", ".join(f"{n} on {host}" for host, n in Counter(hosts).items())
        print(f"ranks: {world_size} ({counts}), all-reduce {sent / min(seconds) / 1e9:.2f} GB/s per rank")


def is_master() -> bool:
    """Whether this is rank 0, which alone prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def all_reduce(tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """Sum a tensor over the ranks in place; without ranks it stays as it is."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def broadcast_object(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def shutdown_distributed() -> None:
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# -----------------------------------------------------------------------------
# The numbers of a step


class StepStats(NamedTuple):
    step: int  # counted from 1
    sequences: int  # seen after it
    tokens: int  # seen after it
    lr: float
    loss: float  # mean over all ranks and micro-batches, nats per token
    grad_norm: float
    seconds: float  # since the last step's stats, without pauses


class StepMonitor:
    """Collects what the ranks must agree on: each step's loss and gradient norm, a request to stop, and the clock.

    submit() sums a step's numbers over the ranks on the device. collect() reads them; on a GPU call it after the next step
    was launched, so that the GPU never waits. `stop`, `minutes` and `skipped` are as of the last collected step, equal on all ranks.
    """

    def __init__(self, device: torch.device, world_size: int, start_time: float):
        self.device, self.world_size, self.start_time = device, world_size, start_time
        self.signals, self.pending = StopSignals(), None
        self.stop, self.minutes = False, broadcast_object((time.perf_counter() - start_time) / 60)
        self.skipped = 0  # updates skipped in a row, up to the last collected step
        self.mark = time.perf_counter()

    def submit(self, state, lr: float, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """state: a checkpoint.State, after the step."""
        minutes = (time.perf_counter() - self.start_time) / 60 if is_master() else 0.0
        local = [torch.full((), float(value), device=self.device) for value in (self.signals.is_set(), minutes)]
        numbers = all_reduce(torch.stack((loss.float(), grad_norm.float(), *local)))
        copied = None
        if self.device.type == "cuda":
            numbers = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.pending = (state.step, state.sequences, state.tokens, lr), numbers, copied

    def collect(self) -> StepStats | None:
        """The numbers of the step submitted last, None if they were collected already."""
        if self.pending is None:
            return None
        (counts, numbers, copied), self.pending = self.pending, None
        if copied:
            copied.synchronize()
        loss, grad_norm, stop, self.minutes = numbers.tolist()
        self.stop, self.skipped = stop > 0, 0 if math.isfinite(grad_norm) else self.skipped + 1
        now = time.perf_counter()
        seconds, self.mark = now - self.mark, now
        # The gradient norm is equal on all ranks.
        return StepStats(*counts, loss / self.world_size, grad_norm / self.world_size, seconds)

    def end_pause(self) -> None:
        """Leave the time since the last collect() out of the next step's seconds: it went into evaluating or saving."""
        self.mark = time.perf_counter()


class StopSignals:
    """While training, SIGTERM, SIGINT and SIGUSR1 ask to stop after the step: `received` is the signal's number, or 0.

    Before and after, they end the process at once, as does a second Ctrl-C one second or more after the first.
    """

    NAMES = [n for n in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, n)]  # Windows has no SIGUSR1

    def __init__(self):
        self.received, self.at = 0, 0.0
        self.catch(False)

    def is_set(self) -> bool:
        return self.received > 0

    def catch(self, training: bool) -> None:
        for name in self.NAMES:
            signal.signal(getattr(signal, name), self.receive if training else signal.SIG_DFL)

    def receive(self, number: int, frame) -> None:
        if not self.received:
            self.received, self.at = number, time.monotonic()
            with contextlib.suppress(OSError):
                os.write(2, f"\n{signal.Signals(number).name}: finishing the step and saving\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self.at > 1:
            os._exit(128 + number)


# -----------------------------------------------------------------------------
# What went wrong


@contextlib.contextmanager
def explain_memory(keys: str):
    """Turn running out of memory into a UserError that names the keys to lower."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as e:
        if not is_out_of_memory(e):
            raise
        raise UserError(f"out of memory ({first_line(e)[:100]}): lower {keys}") from None


@contextlib.contextmanager
def explain_errors(keys: dict):
    """Turn running out of memory and losing a rank into a UserError that says what to change. keys: train.py's globals."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as e:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if is_out_of_memory(e):
            B, T, accumulation = (keys[k] for k in ("batch_size", "block_size", "gradient_accumulation_steps"))
            tips = ["--activation_checkpointing=True", "a smaller --block_size or model"]
            if B > 1:
                part = next(d for d in range(2, B + 1) if B % d == 0)
                smaller = f"--batch_size={B // part} --gradient_accumulation_steps={max(1, accumulation) * part}"
                tips.insert(0, f"{smaller} (the same {B * T * max(1, accumulation):,} tokens per step)")
            raise UserError(
                f"out of memory with micro-batches of {B} x {T} tokens ({first_line(e)[:100]}); try {', or '.join(tips)}"
            ) from None
        if world_size > 1 and (isinstance(e, dist.DistError) or "gloo" in str(e)):
            if int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) < world_size:
                time.sleep(5)  # until torchrun notices the lost host; sooner, it would restart with that host
            raise UserError(f"rank {rank}: another rank is gone ({first_line(e)})") from None
        raise


def bad_step_error(run, stats: StepStats) -> UserError:
    """The error of a step whose loss or gradient is not finite. Names the rank, the micro-batch and the place of its text.

    run: train.py's Run. Called by all ranks. Recomputes the step's micro-batches one at a time, because averaged gradients
    do not show which was bad.
    """
    found = ""
    run.seed_dropout(stats.step - 1)
    for micro in range(run.grad_accum_steps):
        first = run.batches.first_sequence(stats.sequences - run.sequences_per_step, micro)
        run.model.zero_grad(set_to_none=True)
        x, y = run.batches.load(first)
        with run.autocast():
            _, loss = run.model(x, y, return_logits=False)
        loss.backward()
        gradients = (p.grad for p in run.model.parameters() if p.grad is not None)
        if not (math.isfinite(loss.item()) and all(g.isfinite().all() for g in gradients)):
            found = f"rank {run.rank}, micro-batch {micro}: {run.batches.windows.describe(first, len(x))}"
            break
    everyone = [found]
    if run.world_size > 1:
        everyone = [""] * run.world_size
        dist.all_gather_object(everyone, found)
    where = "; ".join(filter(None, everyone)) or "no single micro-batch, their sum overflows"
    return UserError(
        f"step {stats.step:,}: loss {stats.loss:.4g}, gradient norm {stats.grad_norm:.4g}. It comes from {where}. The update "
        "was skipped. Lower --learning_rate, set --grad_clip=1.0 or less, or try --dtype=float32; --resume continues from the last checkpoint"
    )
