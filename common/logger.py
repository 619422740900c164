"""What a training run reports: console, metrics.jsonl, log.txt, samples/, wandb, TensorBoard; results.json and loss.png."""

import contextlib
import html
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common.files import atomic_file, atomic_write, code_hash, lock_run, parse_json, read_metrics
from common.inference import complete, prompt_ids
from common.runtime import StepStats, dtype_name, flops_per_token, peak_flops, peak_memory
from common.tokenizer import tokenizer_from_dict
from configurator import UserError, first_line

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile


@contextlib.contextmanager
def survive_disk_errors(what: str):
    """A full disk costs the file that was to be written, not the run."""
    try:
        yield
    except OSError as e:
        print(f"warning: {what} could not be written ({e.strerror}); training continues")


class LineFile:
    """A log file: each line goes to the disk at once. On a full disk lines are kept until the next write."""

    def __init__(self, path: Path):
        self.file, self.unwritten, self.warned = open(path, "ab", buffering=0), b"", False

    def write(self, text: str) -> None:
        self.unwritten += text.encode(errors="replace")
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as e:
            if not self.warned:
                print(f"warning: {self.file.name} needs space on the disk ({e.strerror})")
            self.warned = True

    def sync(self) -> None:
        with contextlib.suppress(OSError):
            os.fsync(self.file.fileno())


class Logger:
    """Everything rank 0 writes about a run, except checkpoints. run, state: train.py's Run and State."""

    def __init__(self, run, config: dict, datasets: list, state, resuming: bool):
        dataset = datasets[0][0]
        summary_writer = import_summary_writer() if config["tensorboard"] else None
        self.run, self.config, self.state = run, config, state
        self.tokens_per_step = config["gradient_accumulation_steps"] * config["batch_size"] * config["block_size"]
        self.folder, self.first_step = Path(config["out_dir"]), state.step
        self.total_steps = config["max_iters"]  # an estimate where the clock decides; 0: unknown
        self.seconds_before, self.code = state.train_seconds, code_hash()
        self.logged, self.minutes_before = (state.step, state.train_seconds), state.total_seconds / 60
        self.wandb, self.speed, self.last_val_loss, self.scores = None, 0.0, None, {}
        self.plotted = time.monotonic()  # a run of seconds draws once, at its end
        self.peak = peak_flops(run.device, config["peak_tflops"])
        self.flops_per_token = flops_per_token(run.model, config["block_size"])
        self.is_chat = any(each.is_chat for each, _ in datasets)
        self.tokenizer, self.prompt = load_tokenizer(dataset, config["sample_prompt"])
        self.tokenizer_dict = self.tokenizer.to_dict() if self.tokenizer else dataset.tokenizer
        with self.writable():
            self.folder.mkdir(parents=True, exist_ok=True)
            lock_run(self.folder)
        if config["wandb_log"]:
            self.wandb = start_wandb(config, self.folder, state.wandb_id)
            state.wandb_id = self.wandb.id
        with self.writable():
            if not resuming:
                archive_previous_run(self.folder)
            atomic_write(self.folder / "config.json", json.dumps(config, indent=1))
            for leftover in self.folder.glob("*.part"):  # of a run that was killed while it wrote
                leftover.unlink()
            self.metrics = self.rewind("metrics.jsonl", lambda line: parse_json(line)["step"])
            self.text = self.rewind("log.txt", lambda line: int(line.split()[0]))
        self.recorded = {(h["step"], name) for h in read_metrics(self.folder) for name in h.keys() & REPEATED}
        purge_step = state.step + 1 if state.step else None
        self.board = summary_writer and summary_writer(self.folder / "tensorboard", purge_step=purge_step)
        if resuming:
            print(f"resumed at step {state.step:,}")
        self.bar = make_progress_bar(state.step, self.total_steps)  # after wandb, which wraps the console

    @contextlib.contextmanager
    def writable(self):
        try:
            yield
        except OSError as e:
            raise UserError(f"--out_dir={self.folder} cannot be written: {e.strerror}") from None

    def rewind(self, name: str, step_of) -> LineFile:
        """Open a log for appending, without the lines of steps after the one the run resumes from."""
        path = self.folder / name
        lines = (
            path.read_text(encoding="utf-8", errors="replace").splitlines(True)
            if self.first_step and path.exists()
            else []
        )

        def keep(line: str) -> bool:
            try:
                return line.endswith("\n") and step_of(line) <= self.first_step
            except (ValueError, LookupError, TypeError):  # the process died while it wrote the line
                return False

        atomic_write(path, "".join(filter(keep, lines)))
        return LineFile(path)

    def record(self, step: int, tokens: int, **values) -> None:
        """A line of metrics.jsonl, also for wandb and TensorBoard."""
        values = finite(values)
        self.metrics.write(json.dumps({"step": step, "tokens": tokens, **values}) + "\n")
        if self.wandb:
            self.wandb.log(values, step=step)
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self.to_board(lambda board: [board.add_scalar(name, value, step) for name, value in numbers.items()])
        self.recorded |= {(step, name) for name in values.keys() & REPEATED}

    def to_board(self, write) -> None:
        if not self.board:
            return
        try:
            write(self.board)
            self.board.flush()
        except OSError as e:
            print(f"warning: TensorBoard's files cannot be written ({e.strerror}); training continues without them")
            self.board = None

    def progress(self, step: int) -> str:
        """ "1,250/2,200", with ~ before an estimate."""
        if not self.config["max_minutes"]:
            return f"{step:>6,}/{self.total_steps:,}"
        return f"{step:>6,}" + (f"/~{self.total_steps:,}" if step and self.total_steps else "")

    def show_step(self, step: int) -> None:
        """Move the bar of a terminal between two log lines, with the time left from the first steps on."""
        if self.bar is None or step - self.bar.n < 1:
            return
        if not self.speed and self.total_steps:
            pace = (self.state.train_seconds - self.seconds_before) / (step - self.first_step)
            self.bar.set_description_str(f"eta {format_duration((self.total_steps - step) * pace)}", refresh=False)
        self.bar.update(step - self.bar.n)

    def step(self, stats: StepStats, minutes: float) -> None:
        """A log line. minutes: since the start of the run."""
        config, step, seconds_so_far = self.config, stats.step, self.state.train_seconds
        n_steps, seconds = step - self.logged[0], seconds_so_far - self.logged[1]  # since the last line
        self.logged = step, seconds_so_far
        if config["max_minutes"]:  # at the pace since the start of this process
            left = (config["max_minutes"] - minutes) / max(minutes - self.minutes_before, 1e-9)
            expected = step + round(left * (step - self.first_step))
            self.total_steps = min(expected, config["max_iters"] or expected)
        tokens_per_sec = self.tokens_per_step * n_steps / seconds
        self.speed = tokens_per_sec if not self.speed else 0.7 * self.speed + 0.3 * tokens_per_sec
        mfu = tokens_per_sec * self.flops_per_token / self.run.world_size / self.peak if self.peak else None
        eta = format_duration((self.total_steps - step) * self.tokens_per_step / self.speed)
        self.record(
            step, stats.tokens, train_loss=stats.loss, lr=stats.lr, grad_norm=stats.grad_norm,
            tokens_per_sec=round(tokens_per_sec, 1), mfu=mfu, elapsed=seconds_so_far,
        )  # fmt: skip
        self.text.write(f"{step} train {stats.loss:.6f}\n")
        lr, speed = f"lr {stats.lr:.1e}".replace("e-0", "e-"), f"{short_number(tokens_per_sec)} tok/s"
        tail = [speed, *([f"mfu {mfu:.0%}"] if mfu else []), f"eta {eta}"]
        if self.bar is not None:
            val = [] if self.last_val_loss is None else [f"val {self.last_val_loss:.3f}"]
            self.bar.total = self.total_steps or None
            self.bar.set_description_str(" ".join([f"loss {stats.loss:.3f}", *val, lr, *tail]), refresh=False)
            self.bar.update(step - self.bar.n)
            return
        ms = 1e3 * seconds / n_steps
        fields = [self.progress(step), f"loss {stats.loss:.4f}", lr, f"norm {stats.grad_norm:.2f}"]
        fields += [f"{ms:.1f} ms" if ms < 100 else f"{ms:,.0f} ms", *tail]
        line = "  ".join(fields)
        print(line if len(line) <= 80 else " ".join(fields))

    def evaluation(self, state, result: dict) -> None:
        """A validation loss (see train.evaluate), and the picture of the losses."""
        step, loss = state.step, result["loss"]
        if (step, "val_loss") not in self.recorded:  # a resumed run may repeat what its log has
            by_source = {"val_loss_by_source": result["by_source"]} if len(result["by_source"]) > 1 else {}
            values = dict(val_loss=loss, val_accuracy=result["accuracy"], elapsed=state.train_seconds)
            self.record(step, state.tokens, **values, **by_source)
            self.text.write(f"{step} val {loss:.6f}\n")
        self.last_val_loss = loss
        note = "(best)" if loss <= state.best_val_loss else f"(best {state.best_val_loss:.4f})"
        note = note if step else ""
        print(f"{self.progress(step)}  {format_evaluation(result)}  {note}".rstrip())
        if step and time.monotonic() - self.plotted > 10:  # drawing takes a tenth of a second
            self.plot()

    def plot(self) -> None:
        with survive_disk_errors("loss.png"):
            plot_losses(self.folder)
        self.plotted = time.monotonic()

    def hellaswag(self, state, acc: float, acc_norm: float) -> None:
        step = state.step
        if (step, "hellaswag_acc") not in self.recorded:
            self.record(step, state.tokens, hellaswag_acc=acc, hellaswag_acc_norm=acc_norm)
            self.text.write(f"{step} hella {acc_norm:.4f}\n")
        self.scores = {"hellaswag_acc": acc, "hellaswag_acc_norm": acc_norm}
        print(f"{self.progress(step)}  HellaSwag acc {acc:.4f} acc_norm {acc_norm:.4f}")

    def sample(self, step: int) -> str:
        """Continue the prompt without dropout, with its own random numbers; print it, and write it to samples/step_N.txt."""
        if self.tokenizer is None:
            return ""
        run = self.run
        settings = dict(temperature=self.config["sample_temperature"], top_k=min(200, run.model.config.vocab_size))
        rng = torch.Generator(run.device).manual_seed(self.config["seed"])
        try:
            ids = prompt_ids(self.tokenizer, self.prompt)
            with run.autocast():
                (new,) = complete(run.model, self.tokenizer, [ids], 200, graph=False, rng=rng, **settings)
        except UserError as e:  # probabilities that are not finite, a prompt that cannot be encoded
            print(f"warning: no sample at step {step:,} ({e})")
            return ""
        text = self.tokenizer.decode([i for i in ids if i != self.tokenizer.eot] + new)
        with survive_disk_errors("a sample"):
            (self.folder / "samples").mkdir(exist_ok=True)
            atomic_write(self.folder / "samples" / f"step_{step}.txt", text + "\n")
        if self.wandb:
            import wandb

            self.wandb.log({"sample": wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)
        self.to_board(lambda board: board.add_text("sample", text, step))
        print(text)
        return text

    def out_of_patience(self, state) -> None:
        n = state.evals_since_best
        print(f"stopping at step {state.step:,}: no lower loss in {n} evaluations, best.pt has the best weights")

    def stopped(self, state) -> None:
        print(f"stopped at step {state.step:,}: --resume continues from there")

    def sync(self) -> None:
        """Bring the lines so far to the disk, so that no checkpoint is ahead of them."""
        self.metrics.sync()
        self.text.sync()

    def final_evaluation(self, datasets: list) -> None:
        """Say that the last evaluation begins, which may take minutes. datasets: [(Dataset, weight)]."""
        limit = self.config["final_eval_tokens"] or math.inf
        tokens = sum(min(limit, sum(shard.tokens for shard in dataset.val)) for dataset, _ in datasets)
        text = f"final evaluation on {tokens:,} validation tokens"
        if self.bar is None:
            print(text)
        else:
            self.bar.set_description_str(text)

    def finish(self, state, result: dict, total_seconds: float) -> None:
        """results.json, the last sample, and what to do next. result: of the final evaluation."""
        run, config, c, val_loss = self.run, self.config, self.run.model.config, result["loss"]
        speeds = sorted(h["tokens_per_sec"] for h in read_metrics(self.folder) if "tokens_per_sec" in h)
        speed = speeds[len(speeds) // 2] if speeds else None
        results = {
            "final_val_loss": val_loss, "final_val_perplexity": perplexity(val_loss),
            "final_val_accuracy": result["accuracy"], "best_val_loss": state.best_val_loss, "total_steps": state.step,
            "model_parameters": run.model.num_params(),
            "embedding_parameters": c.n_embd * (c.vocab_size + c.block_size * (c.pos == "learned")),
            "tokens": state.tokens, "tokens_per_sec": speed,
            "mfu": speed * self.flops_per_token / run.world_size / self.peak if self.peak and speed else None,
            "train_flops": state.tokens * self.flops_per_token,
            "max_minutes": config["max_minutes"] or None, "train_seconds": state.train_seconds,
            "total_seconds": total_seconds, "peak_memory_mib": peak_memory(run.device), "seed": config["seed"],
            "world_size": run.world_size, "device": str(run.device), "dtype": dtype_name(run.dtype),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
            "git_commit": git_commit(), "code": self.code, **self.scores,
        }  # fmt: skip
        if len(result["by_source"]) > 1:
            results["final_val_loss_by_source"] = result["by_source"]
        atomic_write(self.folder / "results.json", json.dumps(finite(results), indent=1))
        self.plot()
        close_progress_bar()
        print()
        self.sample(state.step)
        print()
        if self.wandb:
            self.wandb.summary.update(results)
            if config["wandb_checkpoint"]:
                self.upload("best.pt" if (self.folder / "best.pt").exists() else "ckpt.pt", state)
            self.wandb.finish()
        self.to_board(lambda board: board.close())
        names = ("results.json", "loss.png", "metrics.jsonl", "best.pt", "ckpt.pt", "samples")
        files, folder = ", ".join(n for n in names if (self.folder / n).exists()), self.folder
        print(f"val loss {val_loss:.4f} after {state.tokens:,} tokens in {total_seconds:.0f} s. {folder}/ has {files}")
        print("Try next:")
        for command, comment in self.next_commands():
            print(f"  {command:<70}  ({comment})" if comment else f"  {command}")

    def next_commands(self) -> list[tuple[str, str]]:
        """(command, comment): what one can do with the run."""
        run, prompt = shlex.quote(str(self.folder)), self.prompt.split("\n")[0]
        if self.is_chat:
            commands = [
                (f"python sample.py --out_dir={run} --chat", ""),
                (f"python export.py --out_dir={run}", "for other programs"),
            ]
        elif self.tokenizer:
            start = f" --start={shlex.quote(prompt)}" if prompt else ""
            commands = [(f"python sample.py --out_dir={run}{start}", "")]
        else:
            commands = [(f"python evaluate.py --checkpoints={run}", "")]
        commands.append((f"python demo.py --out_dir={run}", "the page in a browser: pip install -e '.[demo]'"))
        if self.config["dataset"] == "tinystories_synthetic":
            own = "python prepare_text.py --inputs=my.txt --dataset=mine --tokenizer=char"
            commands.append((own, "then --dataset=mine"))
        return commands

    def upload(self, name: str, state) -> None:
        import wandb

        about = {"file": name, "val_loss": state.best_val_loss}
        artifact = wandb.Artifact(f"{state.wandb_id}-model", "model", metadata=about)
        artifact.add_file(self.folder / name)
        self.wandb.log_artifact(artifact)


def load_tokenizer(dataset, prompt: str) -> tuple:
    """The dataset's tokenizer, None if it cannot be had, and the prompt of the samples.

    A prompt that the vocabulary cannot express, as that of a config for another text, becomes the text's own first words.
    """
    try:
        tokenizer = tokenizer_from_dict(dataset.tokenizer)
    except UserError as e:
        print(f"no samples will be written: {e}")
        return None, prompt
    try:
        prompt_ids(tokenizer, prompt)
    except UserError as e:
        first = [i for i in dataset.train[0].map()[:64].tolist() if i != tokenizer.eot]
        found = re.search(r"\S+(\s+\S+){0,2}", tokenizer.decode(first))  # cut, so that all of it is in the vocabulary
        words, prompt = prompt, found[0] if found else ""
        print(f"--sample_prompt={words!r} cannot be used ({first_line(e)}): samples begin with {prompt!r}")
    return tokenizer, prompt


class NullLogger:
    """The Logger of ranks other than 0: does nothing."""

    tokenizer_dict = None

    def __getattr__(self, name):
        return lambda *args: None


# -----------------------------------------------------------------------------
# Console


def format_evaluation(result: dict) -> str:
    sources = result["by_source"] if len(result["by_source"]) > 1 else {}
    sources = "".join(f"  {name} {loss:.4f}" for name, loss in sources.items())
    loss = result["loss"]
    return f"val loss {loss:.4f}  perplexity {perplexity(loss):.2f}  accuracy {result['accuracy']:.1%}{sources}"


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))  # no overflow


def make_progress_bar(first_step: int, total_steps: int):
    """On a terminal, a bar in the last line under everything that is printed; elsewhere None, and lines are printed."""
    if not sys.stdout.isatty():
        return None
    columns = min(80, shutil.get_terminal_size().columns - 1)
    layout = "{n_fmt}/{total_fmt} {bar} {desc}" if total_steps else "{n_fmt} {bar} {desc}"
    settings = dict(initial=first_step, ncols=columns, bar_format=layout, leave=False, file=sys.stdout)
    bar = tqdm(total=total_steps or None, **settings)
    sys.stdout = DummyTqdmFile(sys.stdout)
    return bar


@contextlib.contextmanager
def progress_bar_closed():
    """Close the progress bar at the end of the block, before an error is printed."""
    try:
        yield
    finally:
        close_progress_bar()


def close_progress_bar() -> None:
    for bar in [*getattr(tqdm, "_instances", ())]:
        bar.close()
    sys.stdout = getattr(sys.stdout, "_wrapped", sys.stdout)


def short_number(number: float) -> str:
    """Three digits and a letter: 52.9k, 1.37M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{max(0, 2 - int(math.log10(max(scaled, 1))))}f}{letter}"
    return f"{number:.3g}"


def format_duration(seconds: float) -> str:
    """12:34, 3:12:34, or 2d 03h."""
    minutes, s = divmod(int(max(0.0, seconds)), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def print_summary(model, datasets: list, config: dict, device: torch.device, dtype: torch.dtype) -> None:
    """What is about to be trained, in four lines; with --dry_run also FLOPs, memory and shapes."""
    c, B, T, max_minutes = model.config, config["batch_size"], config["block_size"], config["max_minutes"]
    micro_batches, steps = config["gradient_accumulation_steps"], config["max_iters"]
    tokens = micro_batches * B * T
    starts_from = config["init_from"] not in ("scratch", "resume")
    source = f"; from {config['init_from']}, which sets the model keys" if starts_from else ""
    sizes = f"{c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, vocabulary {c.vocab_size:,}"
    print(f"model: {model.num_params():,} parameters, {sizes}{source}")
    if c.lora_rank:
        print(f"LoRA: trains {sum(p.numel() for p in model.parameters() if p.requires_grad):,} of the parameters")
    for dataset, weight in datasets:
        train, val = (sum(s.tokens for s in shards) for shards in (dataset.train, dataset.val))
        part = f" ({weight:.1%})" if len(datasets) > 1 else ""
        print(f"data: {dataset.name}{part}, {train:,} training and {val:,} validation tokens")
    time_limit = f"{max_minutes:g} minute" + "s" * (max_minutes != 1)
    limits = [f"{steps:,} steps, {steps * tokens:,} tokens"] * bool(steps) + [time_limit] * bool(max_minutes)
    if config["max_epochs"] and not limits:  # without the dataset their steps are not known
        limits = [f"{config['max_epochs']:g} epoch" + "s" * (config["max_epochs"] != 1)]
    plural = "es" if micro_batches > 1 else ""
    print(f"step: {B} x {T} tokens x {micro_batches} micro-batch{plural} = {tokens:,} tokens; {' or '.join(limits)}")
    copies = {"sgd": 3, "adafactor": 2}.get(config["optimizer"], 4)  # weights, gradients, moments
    state = sum(p.numel() for p in model.parameters()) * 4 * copies
    size = 4 if dtype == torch.float32 else 2
    per_block = B * T * (10 * c.n_embd + 2 * c.mlp_hidden) * size  # what a block keeps for its backward pass
    kept = B * T * c.n_embd * size if c.activation_checkpointing else per_block
    activations = c.n_layer * kept + B * T * c.vocab_size * (size + 8)
    state, activations = state / 2**20, activations / 2**20
    torch_version = torch.__version__.partition("+")[0]
    print(
        f"device: {device}, {dtype_name(dtype)}, torch {torch_version}; about {state + activations:,.0f} MiB for the training"
    )
    if config["dry_run"]:
        if datasets[0][0].tokenizer:
            load_tokenizer(datasets[0][0], config["sample_prompt"])
        palm, causal = flops_per_token(model, T), flops_per_token(model, T, "causal")
        total = f"; {palm * steps * tokens:.3g} in all" if steps else ""
        print(f"FLOPs: {palm:.4g} per token (PaLM), {causal:.4g} (causal, matrix products only){total}")
        print(f"memory: {state:,.0f} MiB weights, gradients, optimizer; about {activations:,.0f} MiB activations")
        print(f"shapes: idx and targets ({B}, {T}) int64, logits ({B}, {T}, {c.vocab_size})")


# -----------------------------------------------------------------------------
# Files


def finite(values: dict) -> dict:
    """JSON has no infinity: such a number becomes None."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


REPEATED = {"val_loss", "hellaswag_acc"}  # a resumed run may measure these again at the step it resumes from
RUN_FILES = (
    "ckpt.pt ckpt_previous.pt best.pt config.json metrics.jsonl log.txt results.json loss.png samples tensorboard"
).split()  # fmt: skip


def archive_previous_run(folder: Path) -> None:
    """Move the files of an earlier run in this folder to previous-1/, previous-2/, ..., so that none is lost."""
    found = [p for p in (*map(folder.joinpath, RUN_FILES), *folder.glob("step_*.pt")) if p.exists()]
    if any(p.suffix == ".pt" or p.name == "metrics.jsonl" and p.stat().st_size for p in found):
        number = next(n for n in range(1, 10**6) if not (folder / f"previous-{n}").exists())
        archive = folder / f"previous-{number}"
        archive.mkdir()
        for path in found:
            path.rename(archive / path.name)
        has_best = (archive / "best.pt").exists()
        hint = f"; --init_from={archive}/best.pt starts from its best weights" if has_best else ""
        print(f"{folder} held another run: its files are now in {archive}{hint}")


def start_wandb(config: dict, folder: Path, run_id: str | None):
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb_log needs the wandb package: pip install wandb") from None
    resume = dict(id=run_id, resume="allow") if run_id else {}
    try:
        names = dict(project=config["wandb_project"], name=config["wandb_run_name"])
        return wandb.init(config=config, dir=folder, **names, **resume)
    except Exception as e:
        raise UserError(f"--wandb_log: {e}; run wandb login, or set WANDB_MODE=offline") from None


def import_summary_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs its package: pip install -e '.[tensorboard]'") from None
    return SummaryWriter


def git_commit() -> str | None:
    """The commit of this repository, with -dirty behind it if files differ from it; None without git or a repository."""
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        command = ["git", "-C", str(Path(__file__).parent), *describe]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None


def plot_losses(folder: Path) -> None:
    """Draw loss.png from metrics.jsonl: training and validation loss by step, the last validation loss marked."""
    history = [h for h in read_metrics(folder) if h["step"]]
    keys = ("train_loss", "val_loss")
    train, val = ([(h["step"], h[key]) for h in history if h.get(key) is not None] for key in keys)
    if max(len(train), len(val)) < 2:  # a single point is no curve, and matplotlib takes a third of a second to import
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=100)
    axes = figure.add_axes((0.1, 0.1, 0.87, 0.83))  # a layout engine would draw everything twice
    if train:
        axes.plot(*zip(*train), color="#56B4E9", linewidth=1, label="training loss")
    if val:
        marker = dict(marker="o", markersize=4) if len(val) < 30 else {}
        axes.plot(*zip(*val), color="#D55E00", linewidth=1.6, label="validation loss", **marker)
        place = dict(xytext=(0, 10), textcoords="offset points", ha="right", color="#D55E00")
        axes.annotate(f"{val[-1][1]:.4f}", val[-1], **place)
    axes.set(title=str(folder), xlabel="step", ylabel="loss (nats per token)", yscale="log")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.grid(True, which="both", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
    with atomic_file(folder / "loss.png") as f:
        figure.savefig(f, format="png")
