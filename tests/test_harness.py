"""evaluate.py --tasks: lm-evaluation-harness on our models gives what its own hf model gives on an export of the same run."""

import json
import random
import re

from conftest import SMALL, TEXT

from common.checkpoint import load_model
from common.harness import HarnessModel
from common.runtime import autocast
from common.tokenizer import tokenizer_from_dict

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

HARNESS = ["lm_eval", "lm_eval.tasks", "lm_eval.models.utils", "lm_eval.api.model"]
TASKS = {
    "choices": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{label}}'\ndoc_to_choice: '{{choices}}'\n"
    "metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    "greedy": "output_type: loglikelihood\ndoc_to_text: '{{question}}'\ndoc_to_target: ' {{choices[0]}}'\nmetric_list:\n  - metric: perplexity\n  - metric: acc\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n",
    "written": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[0]}}'\ngeneration_kwargs:\n  until: ['dogs', '\\n']\n"
    "  max_gen_toks: 12\nmetric_list:\n  - metric: exact_match\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run, its export, and tasks read from local files."""
    from conftest import call

    folder, rng, lines = tmp_path_factory.mktemp("harness"), random.Random(3), TEXT.splitlines()
    (folder / "book.txt").write_text(TEXT)
    keys = "--norm=rmsnorm --mlp=relu2 --pos=rope --qk_norm=True --tie_weights=False --learning_rate=1e-2 --max_iters=80 --block_size=64".split()
    for argv in (
        ["prepare_text.py", "--inputs=book.txt", "--tokenizer=bpe", "--vocab_size=300"],
        ["train.py", *SMALL, "--dataset=book", *keys],
        ["export.py", "--init_from=out/ckpt.pt"],
    ):
        done = call(*argv, cwd=folder)
        assert done.returncode == 0, done.stderr
    (folder / "tasks").mkdir()
    rows = []
    for n in range(24):
        line = rng.choice(lines)
        cut = rng.randrange(8, 30) if n % 2 else line.index("brown")
        rows.append({
            "question": line[:cut].rstrip() + (" " if n % 5 == 0 else ""), "text": " ".join(rng.sample(lines, 1 + n % 4)),
            "choices": [line[cut:].strip() if n % 2 else "brown fox jumps", "lazy dogs", "jumps over it and over it", "9"], "label": rng.randrange(4),
        })  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in TASKS.items():
        data = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/rows.jsonl\ntest_split: test\n"
        (folder / "tasks" / f"{name}.yaml").write_text(data + body)
    return folder


def pairs(answers) -> list[tuple]:
    """The (log probability, greedy) in nested lists."""
    return [answers] if isinstance(answers, tuple) else [pair for answer in answers for pair in pairs(answer)]


@pytest.mark.parametrize("task", TASKS)
def test_every_example_has_the_numbers_of_the_harnesss_own_model_on_the_export(folder, task):
    model, checkpoint = load_model(folder / "out" / "ckpt.pt")
    tokenizer = tokenizer_from_dict(checkpoint["tokenizer"])
    model.config.vocab_size = tokenizer.n_vocab
    cpu = torch.device("cpu")
    ours = HarnessModel(model, tokenizer, lambda: autocast(cpu, torch.float32), 4)
    theirs = HFLM(pretrained=str(folder / "out" / "export"), device="cpu", dtype="float32", batch_size=4)
    found = []
    for each in (ours, theirs):
        manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
        result = lm_eval.simple_evaluate(each, tasks=[task], task_manager=manager, bootstrap_iters=0)
        found.append((result["results"][task], [sample["resps"] for sample in result["samples"][task]]))
    (our_scores, our_answers), (their_scores, their_answers) = found
    assert len(our_answers) == len(their_answers) == 24
    for ours, theirs in zip(our_answers, their_answers):
        if task in ("choices", "greedy"):
            for (loss, greedy), (their_loss, their_greedy) in zip(pairs(ours), pairs(theirs)):
                assert loss == pytest.approx(their_loss, abs=1e-3) and greedy == their_greedy
        elif task == "rolling":
            assert ours[0][0] == pytest.approx(theirs[0][0], abs=1e-3)
        else:
            assert ours == theirs
    for name, value in our_scores.items():
        if isinstance(value, float):
            assert value == pytest.approx(their_scores[name], rel=1e-4), name
    if task == "greedy":
        assert any(greedy for _, greedy in pairs(our_answers))


CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


def test_chat_models_are_asked_in_turns_as_the_harness_asks_them(folder, tmp_path):
    from test_chat import save_with_template
    from test_pretrained import save_llama

    save_llama(tmp_path / "m", vocab_size=150, max_position_embeddings=512)
    save_with_template(tmp_path / "m", CHAT, bos=True, bos_token="<s>")
    (tmp_path / "t").mkdir()
    for name in ("choices", "written"):
        text = (folder / "tasks" / f"{name}.yaml").read_text()
        (tmp_path / "t" / f"{name}.yaml").write_text(text + "gen_prefix: 'The answer is'\n")
    model, checkpoint = load_model(str(tmp_path / "m"))
    ours = HarnessModel(
        model, tokenizer_from_dict(checkpoint["tokenizer"]), lambda: autocast(torch.device("cpu"), torch.float32), 4
    )
    theirs = HFLM(pretrained=str(tmp_path / "m"), device="cpu", dtype="float32", batch_size=4)
    found = []
    for each in (ours, theirs):
        manager = TaskManager(include_path=str(tmp_path / "t"), include_defaults=False)
        options = {"task_manager": manager, "apply_chat_template": True, "bootstrap_iters": 0, "limit": 8}
        result = lm_eval.simple_evaluate(each, tasks=["choices", "written"], **options)
        found.append({task: [sample["resps"] for sample in result["samples"][task]] for task in ("choices", "written")})
    assert found[0]["written"] == found[1]["written"]
    for (loss, _), (their_loss, _) in zip(pairs(found[0]["choices"]), pairs(found[1]["choices"])):
        assert loss == pytest.approx(their_loss, abs=1e-3)


def test_scores_stand_beside_the_loss(run, refused, folder):
    arguments = (
        "--checkpoints=out/ckpt.pt",
        "--tasks=choices,written,",
        "--tasks_dir=tasks",
        "--limit=8",
        "--device=cpu",
    )
    printed = run("evaluate.py", *arguments, cwd=folder, preload=HARNESS)
    row = json.loads((folder / "evaluation" / "evaluation_results.json").read_text())[0]
    assert (
        0 <= row["choices_acc"] <= 1 and "choices_acc_norm" in row and "written_exact_match" in row and row["loss"] > 0
    )
    assert re.search(r"loss +.* choices_acc", printed)
    header = (folder / "evaluation" / "evaluation_results.csv").read_text().splitlines()[0]
    assert "stderr" not in header and "loss" in header and "choices_acc" in header and "samples" not in header


def test_unknown_tasks_and_sums_of_a_model_that_cannot_chat_are_refused(folder):
    from conftest import call

    for task, words in (
        ("nonsense", "has no task nonsense"),
        ("sums", "it is for a model that was trained on conversations"),
    ):
        done = call(
            "evaluate.py", "--checkpoints=out/ckpt.pt", f"--task={task}", "--device=cpu", cwd=folder, preload=HARNESS
        )
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
