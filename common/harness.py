"""A model of ours under lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), for evaluate.py --tasks.

Contexts that several requests share are read once, into the KV cache. The numbers are those of the harness's own `hf` model.
"""

import itertools
import logging

from common.chat import render
from common.inference import stream_ids
from common.scoring import Question, ending_losses
from common.tokenizer import PretrainedTokenizer, Tokenizer
from configurator import UserError, first_line
from model import GPT

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window


class HarnessModel(TemplateLM):
    """The harness's methods for a GPT and its tokenizer. autocast: makes the context of a forward pass."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, autocast, batch_size: int):
        super().__init__()
        self.model, self.our_tokenizer, self.autocast, self.batch_size = model, tokenizer, autocast, batch_size
        self.max_length = model.config.block_size

    @property
    def eot_token_id(self) -> int:
        return self.our_tokenizer.eot or 0

    @property
    def prefix_token_id(self) -> int:
        return self.our_tokenizer.bos[0] if self.our_tokenizer.bos else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return "ours"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        start = self.our_tokenizer.bos
        has_start = bool(start) and string.startswith(self.our_tokenizer.decode(start))  # a chat template wrote it
        if add_special_tokens is False or (add_special_tokens is None and has_start):
            start = ()
        return [*start, *self.our_tokenizer.encode(string, special=True)]

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """add_generation_prompt=False: the last message is the beginning of an answer, and its turn stays open."""
        text = render(self.our_tokenizer, chat_history, add_generation_prompt)
        last = chat_history[-1]["content"].strip()
        return text if add_generation_prompt else text[: text.rindex(last) + len(last)]

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """requests: (texts, context ids, continuation ids). The log probability of each, and whether it is the greedy text."""
        found, by_context = [None] * len(requests), {}
        for n, (_, context, _) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(n)
        groups = list(by_context.items())
        questions = [Question(list(context), [requests[n][2] for n in members], []) for context, members in groups]
        with self.autocast():
            for indices, losses, greedy in ending_losses(self.model, questions, self.batch_size, accuracy=True):
                for row, i in enumerate(indices):
                    for column, n in enumerate(groups[i][1]):
                        found[n] = (-float(losses[row, column]), bool(greedy[row, column]))
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log probability of whole texts, in windows that do not overlap."""
        windows = []  # (number of the request, context ids, ids)
        for n, request in enumerate(requests):
            ids, limit = self.tok_encode(request.args[0]), self.max_length
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=limit, context_len=1)
            windows += [(n, *make_disjoint_window(window)) for window in rolling]
        sums = [0.0] * len(requests)
        for (n, *_), (loglikelihood, _) in zip(windows, self._loglikelihood_tokens(windows)):
            sums[n] += loglikelihood
        return sums

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        found = [""] * len(requests)
        by_settings = itertools.groupby(
            sorted(range(len(requests)), key=lambda n: str(requests[n].args[1])), lambda n: str(requests[n].args[1])
        )
        for _, members in by_settings:
            members = sorted(members, key=lambda n: len(requests[n].args[0]))
            settings = normalize_gen_kwargs(requests[members[0]].args[1], 256)
            end = self.our_tokenizer.decode([self.eot_token_id])
            until, longest = handle_stop_sequences(settings.pop("until", None), eos=end), settings["max_gen_toks"]
            if longest >= self.max_length:
                raise UserError(f"the task asks for {longest} new tokens, the model's context is {self.max_length}")
            temperature = settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0
            for first in range(0, len(members), self.batch_size):
                chunk = members[first : first + self.batch_size]
                rows = [self.tok_encode(requests[n].args[0])[longest - self.max_length :] for n in chunk]
                for n, text in zip(chunk, self.generate(rows, longest, until, temperature)):
                    found[n] = postprocess_generated_text(text, until, None)
        return found

    def generate(self, rows: list[list[int]], longest: int, until: list[str], temperature: float) -> list[str]:
        """The text after each prompt, until all have met one of the texts `until`, or `longest` tokens."""
        tokenizer, shortest = self.our_tokenizer, min(map(len, rows))
        new: list[list[int]] = [[] for _ in rows]
        with self.autocast():
            for count, ids in enumerate(stream_ids(self.model, tokenizer, rows, longest, temperature=temperature), 1):
                for row, i in zip(new, ids.tolist()):
                    row.append(i)
                if count % 16 == 0:  # decoding every text at every token would take longer than sampling them
                    texts = [tokenizer.decode(ids[len(row) - shortest :]) for row, ids in zip(rows, new)]
                    if all(any(stop in text for stop in until) for text in texts):
                        break
        own = (ids[len(row) - shortest :][:longest] for row, ids in zip(rows, new))
        ended = [[*itertools.takewhile(lambda i: i not in tokenizer.stops, ids)] for ids in own]
        if isinstance(tokenizer, PretrainedTokenizer):  # as the harness does it: the space of a first word may go
            return [tokenizer.library.decode(ids, skip_special_tokens=True) for ids in ended]
        return [tokenizer.decode(ids) for ids in ended]


def run_tasks(
    model: GPT,
    tokenizer: Tokenizer,
    tasks: list[str],
    limit: int,
    folder: str,
    autocast,
    batch_size: int,
    is_chat: bool,
) -> dict:
    """The scores of tasks by "task_metric". folder: with tasks of one's own. Raises UserError for an unknown task.

    is_chat: questions that are answered by text are asked as turns.
    """
    # Reading the harness's own tasks takes six seconds.
    manager = TaskManager(include_path=folder or None, include_defaults=not folder)
    if folder and not set(tasks) <= set(manager.all_subtasks):  # not for a group: it may hold some of the harness's own
        manager = TaskManager(include_path=folder)
    known = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        raise UserError(f"--tasks={','.join(tasks)}: lm-evaluation-harness has no task {unknown[0]}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # without a network it tells of each of its retries
    harness_model = HarnessModel(model, tokenizer, autocast, batch_size)
    try:
        results = simple_evaluate(
            harness_model,
            tasks=tasks,
            limit=limit or None,
            task_manager=manager,
            apply_chat_template=is_chat,
            log_samples=False,
        )
    except UserError:
        raise
    except Exception as e:  # of the hub, of a task's own code
        raise UserError(f"--tasks={','.join(tasks)}: {type(e).__name__}: {first_line(e)}") from None
    scores = {}
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            metric = name.removesuffix(",none").replace(",", "_")
            if isinstance(value, float) and "_stderr" not in name:
                scores[f"{task}_{metric}"] = value
    return scores
