"""eval_hellaswag.py: against scoring one ending at a time, with a server of its own, on several ranks, and in training."""

import json
import random

from conftest import SMALL, TEXT, Script, make_nanogpt_chars

import eval_hellaswag
from common.tokenizer import PretrainedTokenizer, gpt2_tokenizer
from configurator import UserError
from model import GPT, GPTConfig

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_prepare import web  # noqa: F401, a fixture
from test_pretrained import save_gpt2, save_gpt2_tokenizer, save_llama
from test_ranks import free_port
from test_tokenizer import foreign_tokenizer


def examples(count: int, labels: bool = True) -> list[dict]:
    rng, words = random.Random(3), TEXT.split() + ["[step]", "[title] Now", "  twice", "naïve"]
    found = []
    for n in range(count):
        first, second = (" ".join(rng.choice(words) for _ in range(rng.randrange(1, 25))) for _ in range(2))
        endings = [" ".join(rng.choice(words) for _ in range(rng.randrange(1, 15))) for _ in range(4)]
        example = {"ind": 7 * n, "activity_label": "Running", "ctx_a": first + ".", "ctx_b": second if n % 3 else ""}
        example |= {"ctx": f"{first}. {second}" if n % 3 else f"{first}.", "endings": endings}
        found.append(example | ({"label": rng.randrange(4)} if labels else {}))
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "hs.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in examples(50)), encoding="utf-8")
    return path


def plain_losses(model, question):
    """One ending at a time, the whole text through the model."""
    losses = []
    for ending in question.endings:
        ids = (question.context + ending)[-model.config.block_size - 1 :]
        logits, _ = model(torch.tensor([ids[:-1]]))
        per_token = F.cross_entropy(logits[0].float(), torch.tensor(ids[1:]), reduction="none")
        losses.append(per_token[-len(ending) :].sum().item())
    return losses


@pytest.mark.parametrize(
    "options", [{}, dict(pos="rope", n_kv_head=1, norm="rmsnorm"), dict(block_size=40), dict(pos="none")]
)
@pytest.mark.parametrize("scoring", ["classic", "harness"])
def test_shared_contexts_and_batches_give_the_losses_of_one_ending_at_a_time(options, scoring):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(vocab_size=50257, n_layer=2, n_head=2, n_embd=32, block_size=128) | options)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    tokenizer = gpt2_tokenizer()
    questions = [eval_hellaswag.QUESTIONS[scoring](e, tokenizer) for e in examples(30)]
    with torch.no_grad():
        expected = [plain_losses(model, q) for q in questions]
    for batch_size in (1, 3, 16):
        found = np.zeros((30, 4))
        for indices, losses, _ in eval_hellaswag.ending_losses(model, questions, batch_size):
            found[indices] = losses
        assert found == pytest.approx(np.array(expected), abs=2e-3, rel=1e-4)


def test_a_tokenizer_that_puts_a_space_before_every_text_sees_one_space_between_context_and_ending():
    tokenizer = PretrainedTokenizer(foreign_tokenizer("unigram").to_str(), "</s>")
    example = {"ctx": "the quick brown", "endings": ["fox jumps", "dogs", "lazy fox", "the fox"], "label": 0}
    question = eval_hellaswag.classic_question(example, tokenizer)
    texts = [tokenizer.decode(question.context + ending) for ending in question.endings]
    assert texts == [f" the quick brown {ending}" for ending in example["endings"]]
    assert question.lengths == [len(ending) for ending in question.endings]


def test_an_ending_without_a_token_is_refused():
    model = GPT(GPTConfig(vocab_size=50, n_layer=1, n_head=1, n_embd=8, block_size=8))
    question = eval_hellaswag.Question([1, 2], [[3], [], [4], [5]], [1, 0, 1, 1])
    with pytest.raises(UserError, match="no token in the model's vocabulary"):
        list(eval_hellaswag.ending_losses(model, [question]))


def test_questions_have_the_texts_of_the_two_conventions():
    tokenizer = gpt2_tokenizer()
    example = {
        "activity_label": "Cooking", "ctx_a": "[header] How to cook [title] Boil water. [step]", "ctx_b": "then  you",
        "ctx": "[header] How to cook [title] Boil water. [step] then  you", "endings": ["wait. [substeps] Sit."] * 4,
    }  # fmt: skip
    classic, harness = (make(example, tokenizer) for make in eval_hellaswag.QUESTIONS.values())
    assert tokenizer.decode(classic.context) == example["ctx"]
    assert tokenizer.decode(classic.endings[0]) == " wait. [substeps] Sit."
    assert classic.lengths[0] == len(classic.endings[0])
    assert tokenizer.decode(harness.context) == "Cooking: How to cook. Boil water. Then you"
    assert tokenizer.decode(harness.endings[0]) == " wait. Sit." and harness.lengths[0] == len("wait. Sit.")


def test_accuracy_is_the_fraction_of_right_choices_and_every_choice_is_written(run, file, tmp_path, gpt2_vocabulary):
    save_gpt2(tmp_path / "m", vocab_size=50257, n_positions=128)
    save_gpt2_tokenizer(tmp_path / "m", gpt2_vocabulary)
    options = ["--data=hs.jsonl", "--output=r/o.jsonl", "--dtype=float32"]
    printed = run("eval_hellaswag.py", "-m", "m", "-d", "cpu", *options)
    rows = [json.loads(line) for line in open(tmp_path / "r" / "o.jsonl")]
    assert [r["ind"] for r in rows] == [7 * n for n in range(50)]
    for scoring in ("classic", "harness"):
        for metric, divide in (("acc", lambda r: 1.0), ("acc_norm", lambda r: np.array(r["lengths"]))):
            right = [int(np.argmin(np.array(r[scoring]["losses"]) / divide(r[scoring]))) == r["label"] for r in rows]
            assert [r[scoring][metric] == r["label"] for r in rows] == right
            line = next(x for x in printed.splitlines() if x.startswith(scoring))
            assert f"{metric} {np.mean(right):.4f}" in line and "examples/s" in line
    few = run("eval_hellaswag.py", "--model_name", "m", "--data=hs.jsonl", "--limit=7", "--scoring=classic")
    assert "7 examples" in few and "harness" not in few


def test_ranks_share_the_examples_and_give_the_same_scores(run, file, tmp_path):
    save_llama(tmp_path / "m", vocab_size=50304, max_position_embeddings=128)
    keys = ["--init_from=m", "--data=hs.jsonl", "--dtype=float32", "--device=cpu"]
    alone = run("eval_hellaswag.py", *keys, "--output=one.jsonl")
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        Script("eval_hellaswag.py", *keys, "--output=two.jsonl", cwd=tmp_path, env={**env, "RANK": str(r)})
        for r in range(2)
    ]
    assert [r.wait(90).returncode for r in ranks] == [0, 0], [r.stderr for r in ranks]
    one, two = ([json.loads(line) for line in open(tmp_path / f"{n}.jsonl")] for n in ("one", "two"))
    assert [r["ind"] for r in one] == [r["ind"] for r in two]
    for a, b in zip(one, two):
        assert a["classic"]["losses"] == pytest.approx(b["classic"]["losses"], abs=1e-3)
    scores = [
        [" ".join(x.split()[:5]) for x in p.splitlines() if "acc_norm" in x][-2:] for p in (alone, ranks[0].stdout)
    ]
    assert scores[0] == scores[1] and not ranks[1].stdout


def test_a_split_is_downloaded_once_and_its_examples_are_counted(run, refused, tmp_path, web, monkeypatch):  # noqa: F811
    save_llama(tmp_path / "m", vocab_size=50304, max_position_embeddings=128)
    monkeypatch.setitem(
        eval_hellaswag.SPLITS, "test", 10
    )  # warm.py forks other processes: this holds for the calls below
    web.files["hellaswag_test.jsonl"] = "".join(json.dumps(e) + "\n" for e in examples(10, labels=False)).encode()
    monkeypatch.setattr(eval_hellaswag, "source", web.url)
    assert len(eval_hellaswag.find_examples("test", str(tmp_path))) == 10
    assert len(eval_hellaswag.find_examples("test", str(tmp_path), 4)) == 4 and len(web.asked) == 1
    keys = ["--init_from=m", "--split=test", f"--data_dir={tmp_path}", f"--source={web.url}"]
    assert "holds 10 examples of 10,003: remove it" in refused("eval_hellaswag.py", *keys)
    printed = run("eval_hellaswag.py", "--init_from=m", f"--data={tmp_path}/hellaswag/hellaswag_test.jsonl")
    assert "classic  no labels" in printed
    assert "404" in refused("eval_hellaswag.py", *keys, "--split=train")


def test_training_scores_hellaswag_at_intervals_and_at_the_end(run, tmp_path):
    make_nanogpt_chars(tmp_path / "data" / "chars", TEXT)
    endings = [TEXT[9 * k : 9 * k + 6] for k in range(1, 5)]
    texts = [{"ctx": TEXT[40 * n : 40 * n + 20], "endings": endings, "label": n % 4} for n in range(20)]
    (tmp_path / "hs.jsonl").write_text("".join(json.dumps(e) + "\n" for e in texts))
    keys = [*SMALL, "--dataset=chars", "--hellaswag_data=hs.jsonl", "--hellaswag_limit=16"]
    printed = run("train.py", *keys, "--hellaswag_interval=2")
    assert printed.count("HellaSwag acc") == 3
    lines = (tmp_path / "out" / "log.txt").read_text().splitlines()
    scored = [line.split() for line in lines if " hella " in line]
    assert [int(step) for step, _, _ in scored] == [2, 4, 6]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert float(scored[-1][2]) == pytest.approx(results["hellaswag_acc_norm"], abs=1e-4)
    options = ["--out_dir=out", "--init_from=out/ckpt.pt", "--data=hs.jsonl", "--limit=16", "--dtype=float32"]
    alone = run("eval_hellaswag.py", *options)
    assert f"acc {results['hellaswag_acc']:.4f} acc_norm {results['hellaswag_acc_norm']:.4f}" in alone
    without = run("train.py", *SMALL, "--dataset=chars", "--out_dir=without")
    found = [
        [json.loads(x).get("train_loss") for x in open(tmp_path / d / "metrics.jsonl") if "train_loss" in x]
        for d in ("out", "without")
    ]
    assert found[0] == found[1] and "HellaSwag" not in without  # scoring does not change the training


def test_training_refuses_examples_it_cannot_score_before_its_first_step(refused, tmp_path):
    make_nanogpt_chars(tmp_path / "data" / "chars", TEXT)
    keys = [*SMALL, "--dataset=chars", "--hellaswag_interval=4", "--hellaswag_data=hs.jsonl"]
    example = {"ctx": TEXT[:20], "endings": [TEXT[:99]] * 4, "label": 0}
    for wrong, words in ((example, "context of 32"), (example | {"endings": ["é"] * 4}, "character 'é' is not among")):
        (tmp_path / "hs.jsonl").write_text(json.dumps(wrong) + "\n", encoding="utf-8")
        assert words in refused("train.py", *keys)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--split=dev"], "--split=dev: choose one of train, val, test"),
        (["--scoring=best"], "--scoring=best: choose"),
        (["--data=gone"], "--data=gone: no such file"),
        (["--data=empty.jsonl"], "empty.jsonl holds no examples"),
        (["--data=bad.jsonl"], "bad.jsonl, line 2: not a HellaSwag example: it needs a ctx and four endings"),
        (["--data=worse.jsonl"], "worse.jsonl, line 1: not a HellaSwag example: there is no 'ctx'"),
        (["--limit=-1"], "--limit=-1"),
        (["--data=good.jsonl", "--init_from=nowhere"], "nowhere"),
        (["--data=long.jsonl", "--init_from=m"], "more tokens than the model's context of 48"),
    ],
)
def test_bad_input_is_refused_in_one_line(refused, tmp_path, arguments, words):
    good = examples(3)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "good.jsonl").write_text(json.dumps(good[0]) + "\n")
    (tmp_path / "bad.jsonl").write_text(json.dumps(good[0]) + "\n" + json.dumps(good[1] | {"endings": ["a"]}) + "\n")
    (tmp_path / "worse.jsonl").write_text('{"text": "hm"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps(good[0] | {"endings": ["word " * 100] * 4}) + "\n")
    if "--init_from=m" in arguments:
        save_gpt2(tmp_path / "m", vocab_size=50257)
    assert words in refused("eval_hellaswag.py", *arguments)
