"""What a training run tells: the console, metrics.jsonl, log.txt, samples/, wandb, and in the end results.json, loss.png."""

import contextlib
import html
import json
import math
import os
import shlex
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from common.runtime import peak_flops, peak_memory
from common.shards import atomic_write
from common.tokenizer import tokenizer_from_dict


@contextlib.contextmanager
def going_on(what: str):
    """A disk that is full costs what was to be written, not the run."""
    try:
        yield
    except OSError as e:
        print(f"warning: {what} could not be written ({e.strerror}); training goes on")


class Lines:
    """A file that lines are added to, each on its way to the disk at once. On a full disk they wait for the next one."""

    def __init__(self, path: Path):
        self.file, self.waiting, self.told = open(path, "ab", buffering=0), b"", False

    def write(self, text: str) -> None:
        self.waiting += text.encode()
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as e:
            if not self.told:
                print(f"warning: {self.file.name} waits for room on the disk ({e.strerror})")
            self.told = True

    def sync(self) -> None:
        with contextlib.suppress(OSError):
            os.fsync(self.file.fileno())


class Log:
    """What rank 0 writes of a run. `run` is train.py's Run, `config` its keys as resolved."""

    def __init__(
        self, run, config: dict, tokenizer: dict, tokens_a_step: int, first_step: int, steps: int, wandb_id: str | None
    ):
        SummaryWriter = board_writer() if config["tensorboard"] else None  # what is missing is said before a file moves
        purge = first_step + 1 if first_step else None
        self.run, self.config, self.tokens_a_step = run, config, tokens_a_step
        self.first_step = first_step
        self.steps = steps  # of the whole run; an estimate where the clock decides
        self.folder, self.wandb, self.wandb_id, self.rate = Path(config["out_dir"]), None, wandb_id, 0.0
        try:
            self.tokenizer = tokenizer_from_dict(tokenizer)
        except (ValueError, ImportError) as e:
            self.tokenizer = None
            print(f"no samples will be written: {e}")
        self.prompt()  # one that the tokenizer cannot encode is refused now, not at the end
        name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else ""
        self.peak = config["peak_tflops"] * 1e12 or peak_flops(name)
        self.flops = run.model.flops_per_token(config["block_size"])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f"--out_dir={self.folder} cannot be written: {e.strerror}") from None
        if config["wandb_log"]:
            try:
                import wandb
            except ImportError:
                raise ImportError("--wandb_log needs the wandb package: pip install wandb") from None
            name, again = config["wandb_run_name"], dict(id=wandb_id, resume="allow") if wandb_id else {}
            try:
                self.wandb = wandb.init(
                    project=config["wandb_project"], name=name, config=config, dir=self.folder, **again
                )
            except Exception as e:
                raise ValueError(f"--wandb_log: {e}; run wandb login, or set WANDB_MODE=offline") from None
            self.wandb_id = self.wandb.id
        try:
            if not first_step and not config["resume"]:
                put_aside(self.folder)
            atomic_write(self.folder / "config.json", json.dumps(config, indent=1))
        except OSError as e:
            raise ValueError(f"--out_dir={self.folder} cannot be written: {e.strerror}") from None
        for left in self.folder.glob("*.part"):  # of a run that was killed while it wrote
            left.unlink()
        self.metrics = self.rewind("metrics.jsonl", lambda line: json.loads(line)["step"], first_step)
        self.text = self.rewind("log.txt", lambda line: int(line.split()[0]), first_step)
        self.evaluated = {h["step"] for h in read_metrics(self.folder) if "val_loss" in h}
        self.scored = {h["step"] for h in read_metrics(self.folder) if "hellaswag_acc" in h}
        self.score: dict[str, float] = {}  # the latest on HellaSwag, if it is looked at
        self.last_val = None
        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=purge) if SummaryWriter else None
        self.bar = make_bar(first_step, steps)  # wandb has wrapped the console by now

    def rewind(self, name: str, step_of, first_step: int):
        """Open a log for appending, without what it says of steps after first_step, which come again."""
        path = self.folder / name
        lines = path.read_text(encoding="utf-8").splitlines(True) if first_step and path.exists() else []

        def before(line: str) -> bool:  # a line may be half: the run died writing it
            try:
                return line.endswith("\n") and step_of(line) <= first_step
            except (ValueError, LookupError, TypeError):
                return False

        atomic_write(path, "".join(filter(before, lines)))
        return Lines(path)

    def record(self, step: int, **values) -> None:
        values = finite(values)
        entry = {"step": step, "tokens": step * self.tokens_a_step, **values}
        self.metrics.write(json.dumps(entry) + "\n")
        if self.wandb:
            self.wandb.log(values, step=step)
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self.to_board(lambda board: [board.add_scalar(name, value, step) for name, value in numbers.items()])

    def to_board(self, write) -> None:
        """On TensorBoard, for as long as its files can be written."""
        if not self.board:
            return
        try:
            write(self.board)
            self.board.flush()
        except OSError as e:
            print(f"warning: TensorBoard's files cannot be written ({e.strerror}); training goes on without")
            self.board = None

    def place(self, step: int) -> str:
        if not self.config["max_minutes"]:
            return f"{step:>6,}/{self.steps:,}"
        return f"{step:>6,}" + (f"/~{self.steps:,}" if step and self.steps < sys.maxsize else "")

    def step(self, step: int, loss: float, norm: float, lr: float, seconds: float, elapsed: float) -> None:
        """seconds: of one step, on average since the last line. elapsed: spent training."""
        per_second = self.tokens_a_step / seconds
        self.rate = per_second if not self.rate else 0.9 * self.rate + 0.1 * per_second
        mfu = per_second * self.flops / self.run.world / self.peak if self.peak else None
        left = (self.steps - step) * self.tokens_a_step / self.rate
        self.record(
            step, train_loss=loss, lr=lr, grad_norm=norm, tokens_per_sec=round(per_second, 1), mfu=mfu, elapsed=elapsed
        )
        self.text.write(f"{step} train {loss:.6f}\n")
        speed, eta = f"{short(per_second)} tok/s", f"eta {duration(left)}"
        rate, known = f"lr {lr:.1e}".replace("e-0", "e-"), [f"mfu {mfu:.0%}"] if mfu else []
        if self.bar is not None:
            val = [] if self.last_val is None else [f"val {self.last_val:.3f}"]
            self.bar.total = self.steps if self.steps < sys.maxsize else None
            self.bar.set_description_str(" ".join([f"loss {loss:.3f}", *val, rate, speed, *known, eta]), refresh=False)
            self.bar.update(step - self.bar.n)
            return
        milliseconds = f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else f"{seconds * 1e3:,.0f} ms"
        fields = [f"{self.place(step)}", f"loss {loss:.4f}", rate, f"norm {norm:.2f}", milliseconds, speed, *known, eta]
        line = "  ".join(fields)
        print(line if len(line) <= 80 else " ".join(fields))

    def validation(self, step: int, loss: float, accuracy: float, best: float, by_source: dict[str, float]) -> None:
        """by_source: the loss on each dataset of a mixture, if it is one."""
        if step not in self.evaluated:  # else a resumed run repeats what its log has
            more = {"val_loss_by_source": by_source} if by_source else {}
            self.record(step, val_loss=loss, val_accuracy=accuracy, **more)
            self.text.write(f"{step} val {loss:.6f}\n")
        self.last_val = loss
        note = "(best)" if loss <= best else f"(best {best:.4f})"
        print(f"{self.place(step)}  {measures(loss, accuracy, by_source)}  {note}")
        if step:
            with going_on("loss.png"):
                plot_losses(self.folder)

    def hellaswag(self, step: int, acc: float, acc_norm: float) -> None:
        if step not in self.scored:
            self.record(step, hellaswag_acc=acc, hellaswag_acc_norm=acc_norm)
            self.text.write(f"{step} hella {acc_norm:.4f}\n")
        self.score = {"hellaswag_acc": acc, "hellaswag_acc_norm": acc_norm}
        print(f"{self.place(step)}  HellaSwag acc {acc:.4f} acc_norm {acc_norm:.4f}")

    def prompt(self) -> list[int]:
        if self.tokenizer is None:
            return []
        return self.tokenizer.encode(self.config["sample_prompt"], special=True) or [self.tokenizer.eot or 0]

    def sample(self, step: int) -> str:
        """Complete the prompt with dropout off, on random numbers of its own, into samples/step_N.txt."""
        if self.tokenizer is None:
            return ""
        ids, eot = self.prompt(), self.tokenizer.eot
        start = torch.tensor([ids], device=self.run.device)
        dice = torch.Generator(self.run.device).manual_seed(self.config["seed"])
        stop = () if eot is None else (eot,)
        temperature, top_k = self.config["sample_temperature"], min(200, self.run.model.config.vocab_size)
        try:
            with self.run.autocast():
                new = self.run.model.generate(
                    start, 200, temperature, top_k, stop_tokens=stop, generator=dice, graph=False
                )
                ids = [i for i in ids + [t.item() for t in new] if i != eot and i < self.tokenizer.n_vocab]
        except RuntimeError as e:  # probabilities that are not numbers
            print(f"warning: no sample at step {step:,} ({e})")
            return ""
        text = self.tokenizer.decode(ids)
        with going_on("a sample"):
            (self.folder / "samples").mkdir(exist_ok=True)
            atomic_write(self.folder / "samples" / f"step_{step}.txt", text + "\n")
        if self.wandb:
            import wandb

            self.wandb.log({"sample": wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)
        self.to_board(lambda board: board.add_text("sample", text, step))
        return text

    def sync(self) -> None:
        """Bring the lines so far to the disk, so that no checkpoint is ahead of them."""
        self.metrics.sync()
        self.text.sync()

    def finish(
        self, val_loss: float, accuracy: float, by_source: dict, best: float, skipped: int, trained: float, total: float
    ) -> None:
        run, tokens = self.run, self.steps * self.tokens_a_step
        history = read_metrics(self.folder)
        speeds = sorted(h["tokens_per_sec"] for h in history if "tokens_per_sec" in h)
        speed = speeds[len(speeds) // 2] if speeds else None
        results = {
            "final_val_loss": val_loss,
            "final_val_perplexity": math.exp(min(val_loss, 700)),
            "final_val_accuracy": accuracy,
            "best_val_loss": best,
            "total_steps": self.steps,
            "skipped_steps": skipped,
            "model_parameters": run.model.num_params(),
            "tokens": tokens,
            "tokens_per_sec": speed,
            "mfu": speed * self.flops / run.world / self.peak if self.peak and speed else None,
            "train_flops": tokens * self.flops,
            "max_minutes": self.config["max_minutes"] or None,
            "train_seconds": trained,
            "total_seconds": total,
            "peak_memory_mib": peak_memory(run.device),
            "seed": self.config["seed"],
            "world_size": run.world,
            "device": str(run.device),
            "dtype": str(run.dtype).removeprefix("torch."),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
            "git_commit": git_commit(),
        }
        results |= self.score
        if by_source:
            results["final_val_loss_by_source"] = by_source
        atomic_write(self.folder / "results.json", json.dumps(finite(results), indent=1))
        text = self.sample(self.steps)
        close_bars()
        if text:
            print(f"\n{text}\n")
        if self.wandb:
            self.wandb.summary.update(results)
            if self.config["wandb_checkpoint"]:
                self.upload("best.pt" if (self.folder / "best.pt").exists() else "ckpt.pt", best)
            self.wandb.finish()
        self.to_board(lambda board: board.close())
        since = f" since step {self.first_step:,}" if self.first_step else ""
        names = ("results.json", "loss.png", "metrics.jsonl", "best.pt", "ckpt.pt", "samples")
        files = ", ".join(n for n in names if (self.folder / n).exists())
        print(f"val loss {val_loss:.4f} after {tokens:,} tokens in {total:.0f} s{since}. {self.folder}/ has {files}")
        start = shlex.quote(self.config["sample_prompt"].split("\n")[0] or " ".join(text.split()[:3])[:40])
        print("Try next:")
        print(f"  python sample.py --out_dir={self.folder} --start={start}")
        print(f"  python sample.py --out_dir={self.folder} --chat")
        print("  python prepare_text.py --input=my.txt --dataset=mine --tokenizer=char      (train on your own text)")

    def upload(self, name: str, loss: float) -> None:
        """A checkpoint as an artifact of the wandb run."""
        import wandb

        artifact = wandb.Artifact(f"{self.wandb_id}-model", "model", metadata={"file": name, "val_loss": loss})
        artifact.add_file(self.folder / name)
        self.wandb.log_artifact(artifact)


def measures(loss: float, accuracy: float, by_source: dict[str, float]) -> str:
    """A line of what an evaluation found."""
    sources = "".join(f"  {name} {value:.4f}" for name, value in by_source.items())
    return f"val loss {loss:.4f}  perplexity {math.exp(min(loss, 700)):.2f}  accuracy {accuracy:.1%}{sources}"


def make_bar(first_step: int, steps: int):
    """On a terminal a bar in its last line, above which all that is printed goes by; elsewhere None, and there are lines."""
    if not sys.stdout.isatty():
        return None
    columns = min(80, shutil.get_terminal_size().columns - 1)
    total = steps if steps < sys.maxsize else None
    layout = "{n_fmt}/{total_fmt} {bar} {desc}" if total else "{n_fmt} {bar} {desc}"
    bar = tqdm(total=total, initial=first_step, ncols=columns, bar_format=layout, leave=False, file=sys.stdout)
    sys.stdout = DummyTqdmFile(sys.stdout)
    return bar


def close_bars() -> None:
    """Before the last words: the bar goes, and what is printed is printed."""
    for bar in [*getattr(tqdm, "_instances", ())]:
        bar.close()
    sys.stdout = getattr(sys.stdout, "_wrapped", sys.stdout)


def board_writer():
    """The class that writes TensorBoard's event files."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("--tensorboard needs its package: pip install -e '.[tensorboard]'") from None
    return SummaryWriter


def short(number: float) -> str:
    """Three digits and a letter: 52.9k, 1.37M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{max(0, 2 - int(math.log10(max(scaled, 1))))}f}{letter}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """12:34, 3:12:34, or 2d 03h."""
    s = int(max(0.0, seconds))
    if s >= 86400:
        return f"{s // 86400}d {s % 86400 // 3600:02d}h"
    return f"{s // 3600}:{s % 3600 // 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"


def finite(values: dict) -> dict:
    """JSON knows no infinity: such a number becomes None."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def read_metrics(folder: Path) -> list[dict]:
    with open(folder / "metrics.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def put_aside(folder: Path) -> None:
    """Move the files of an earlier run in this folder to previous-1/, or -2 and so on, so that none is lost."""
    names = (
        "ckpt.pt",
        "ckpt_previous.pt",
        "best.pt",
        "config.json",
        "metrics.jsonl",
        "log.txt",
        "results.json",
        "loss.png",
        "samples",
        "tensorboard",
    )
    found = [
        p
        for p in (*map(folder.joinpath, names), *folder.glob("step_*.pt"), *folder.glob("bad_step_*.pt"))
        if p.exists()
    ]
    if any(p.suffix == ".pt" or p.name == "metrics.jsonl" for p in found):
        number = next(n for n in range(1, 10**6) if not (folder / f"previous-{n}").exists())
        aside = folder / f"previous-{number}"
        aside.mkdir()
        for path in found:
            path.rename(aside / path.name)
        print(f"{folder} held a run already: its files are in {aside} now (--resume goes on with a run instead)")


def git_commit() -> str | None:
    if not shutil.which("git"):
        return None
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    return done.stdout.strip() or None


def describe(
    model, found: list, config: dict, on: torch.device, kind: torch.dtype, steps: int, micro_batches: int
) -> None:
    """Print what is about to be trained, by train.py's keys; of a dry run also its FLOPs, memory and shapes."""
    c, B, T, max_minutes = model.config, config["batch_size"], config["block_size"], config["max_minutes"]
    tokens = micro_batches * B * T
    sizes = (
        f"{c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context {c.block_size}, vocabulary {c.vocab_size:,}"
    )
    print(f"model: {model.num_params():,} parameters: {sizes}")
    if c.lora_rank:
        print(f"LoRA: {sum(p.numel() for p in model.parameters() if p.requires_grad):,} of them are trained")
    print(f"device: {on}, {str(kind).removeprefix('torch.')}, torch {torch.__version__}")
    for each, share in found:
        train, val = (sum(s.tokens for s in shards) for shards in (each.train, each.val))
        part = f" ({share:.1%})" if len(found) > 1 else ""
        print(f"data: {each.name}{part}, {train:,} train, {val:,} val tokens")
    until = f"{max_minutes:g} minutes, however many steps" if max_minutes else f"{steps:,} steps, {steps * tokens:,}"
    print(
        f"step: {B} x {T} tokens x {micro_batches} micro-batch{'es' * (micro_batches > 1)} = {tokens:,} tokens; {until}"
    )
    if config["dry_run"]:
        palm, causal = model.flops_per_token(T), model.flops_per_token(T, "causal")
        whole = "" if max_minutes else f"; {palm * steps * tokens:.3g} in all"
        print(f"FLOPs: {palm:.4g} a token (PaLM), {causal:.4g} (causal, products alone){whole}")
        state = sum(p.numel() for p in model.parameters()) * 4 * {"sgd": 3, "adafactor": 2}.get(config["optimizer"], 4)
        size = 4 if kind == torch.float32 else 2
        block = B * T * (10 * c.n_embd + 2 * c.mlp_hidden) * size  # what a block keeps for its backward pass
        kept = B * T * c.n_embd * size if c.activation_checkpointing else block
        activations = c.n_layer * kept + B * T * c.vocab_size * (size + 8)
        print(
            f"memory: {state / 2**20:,.0f} MiB weights, gradients, optimizer; about {activations / 2**20:,.0f} MiB activations"
        )
        print(f"shapes: idx and targets ({B}, {T}) int64, logits ({B}, {T}, {c.vocab_size})")


FONT = {  # five columns a glyph, the lowest bit on top
    "0": "3e5149453e", "1": "00427f4000", "2": "4261514946", "3": "2141454b31", "4": "1814127f10", "5": "2745454539",
    "6": "3c4a494930", "7": "0171090503", "8": "3649494936", "9": "064949291e", ".": "0060600000", "a": "2054545478",
    "e": "3854545418", "i": "00447d4000", "k": "7f10284400", "l": "00417f4000", "n": "7c08040478", "o": "3844444438",
    "p": "7c14141408", "r": "7c08040408", "s": "4854545420", "t": "043f444020", "v": "1c2040201c", "M": "7f020c027f",
}  # fmt: skip


def plot_losses(folder: Path) -> None:
    """Draw loss.png from metrics.jsonl: training and validation loss (on a logarithmic axis) by step.

    In numpy alone, so that every run leaves its picture; research/ draws with matplotlib.
    """
    history = read_metrics(folder)
    series = [
        (name, rgb, np.array([(h["step"], h[key]) for h in history if h["step"] and h.get(key)]))
        for name, key, rgb in (("train loss", "train_loss", (150, 180, 220)), ("val loss", "val_loss", (200, 60, 20)))
    ]
    series = [s for s in series if len(s[2])]
    if not series:
        return
    points = np.concatenate([s[2] for s in series])
    x1, low, high = points[:, 0].max(), 0.97 * points[:, 1].min(), 1.03 * points[:, 1].max()
    W, H, left, top, right, bottom = 1600, 1000, 150, 50, 40, 110
    image = np.full((H, W, 3), 255, np.uint8)

    def text(x: float, y: float, words: str, rgb=(60, 60, 60), scale=4) -> None:
        for n, char in enumerate(words):
            columns = np.frombuffer(bytes.fromhex(FONT.get(char, "0000000000")), np.uint8)
            bits = (columns[None] >> np.arange(7)[:, None] & 1).astype(bool).repeat(scale, 0).repeat(scale, 1)
            spot = image[int(y) : int(y) + 7 * scale, int(x) + 6 * scale * n :][:, : 5 * scale]
            spot[bits[: spot.shape[0], : spot.shape[1]]] = rgb

    def place(steps, losses):
        x = left + steps / x1 * (W - left - right)
        return x, top + np.log(high / losses) / math.log(high / low) * (H - top - bottom)

    def ticks(a: float, b: float) -> np.ndarray:
        size = 10 ** math.floor(math.log10((b - a) / 4))
        size *= next(m for m in (1, 2, 2.5, 5, 10) if (b - a) / (m * size) <= 7)
        return np.arange(math.ceil(a / size) * size, b + size / 1e3, size)

    powers = [m * 10.0**e for e in range(-4, 3) for m in (1, 1.5, 2, 3, 4, 5, 7)]
    for loss in [p for p in powers if low < p < high] if high > 2 * low else ticks(low, high):
        y = int(place(0, loss)[1])
        image[y : y + 2, left : W - right] = 225
        text(left - 24 * len(f"{loss:.4g}") - 16, y - 13, f"{loss:.4g}")
    for step in ticks(0, x1):
        label = f"{step / 1e6:g}M" if x1 >= 1e6 else f"{step / 1e3:g}k" if x1 >= 1e4 else f"{step:g}"
        x = int(place(step, 1)[0])
        image[H - bottom : H - bottom + 12, x : x + 2] = 120
        text(x - 12 * len(label), H - bottom + 20, label)
    image[top : H - bottom, left : left + 2] = image[H - bottom : H - bottom + 2, left : W - right] = 120
    text((W + left) / 2 - 48, H - 44, "step")
    for n, (name, rgb, data) in enumerate(series):
        x, y = place(data[:, 0], data[:, 1])
        for i in range(max(1, len(x) - 1)):
            j = min(i + 1, len(x) - 1)
            dense = np.linspace(0, 1, int(max(abs(x[j] - x[i]), abs(y[j] - y[i]))) + 1)
            px, py = (x[i] + dense * (x[j] - x[i])).astype(int), (y[i] + dense * (y[j] - y[i])).astype(int)
            for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1), (-1, 0), (0, -1)):
                image[np.clip(py + dy, 0, H - 1), np.clip(px + dx, 0, W - 1)] = rgb
        text(W - right - 260, top + 10 + 50 * n, name, rgb)
    four = [image[y::2, x::2].astype(np.uint16) for y in (0, 1) for x in (0, 1)]
    half = (sum(four) // 4).astype(np.uint8)  # smooth by averaging
    rows = b"".join(b"\0" + row.tobytes() for row in half)
    png = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">2I5B", W // 2, H // 2, 8, 2, 0, 0, 0)
    for tag, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 6)), (b"IEND", b"")):
        png += struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))
    atomic_write(folder / "loss.png", png)
