import json
import re
import signal
import time
from types import SimpleNamespace

from conftest import SMALL, Script, call, call_on_terminal, make_nanogpt_chars

import sample as script
from common.inference import text_pieces, until
from common.runtime import explain_memory
from common.tokenizer import CharTokenizer
from configurator import UserError

import pytest
import torch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run that has learned the alphabet."""
    folder = tmp_path_factory.mktemp("trained")
    make_nanogpt_chars(folder / "data" / "abc", "abcdefghijklmnopqrstuvwxyz" * 100)
    done = call(
        "train.py", *SMALL, "--dataset=abc", "--max_iters=60", "--learning_rate=1e-2", "--eval_interval=0", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder


def sample(folder, *arguments, code=0, **options):
    done = call("sample.py", "--device=cpu", *arguments, cwd=folder, **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr.strip().splitlines()[-1]


def test_a_runs_folder_is_enough_to_sample(trained, tmp_path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "best.pt").write_bytes((trained / "out" / "best.pt").read_bytes())
    text = sample(tmp_path, "--out_dir=alone", "--start=abc", "--temperature=0", "--max_new_tokens=10")
    assert text == "abcdefghijklm\n"


def test_one_sample_several_samples_and_a_prompt_from_a_file(trained, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("xyzab")
    one = sample(trained, f"--start=FILE:{prompt}", "--temperature=0", "--max_new_tokens=4")
    assert one == "xyzabcdef\n"
    three = sample(trained, "--start=mno", "--temperature=0", "--max_new_tokens=4", "--num_samples=3")
    assert three == "mnopqrs\n---------------\n" * 3


def test_the_same_seed_gives_the_same_text_and_another_seed_another(trained):
    options = ("--start=a", "--temperature=3.0", "--max_new_tokens=40", "--top_k=0")
    first, again = sample(trained, *options), sample(trained, *options)
    assert first == again != sample(trained, *options, "--seed=7")


def test_a_stop_text_ends_the_sample_and_is_not_part_of_it(trained):
    assert sample(trained, "--start=abc", "--temperature=0", "--max_new_tokens=20", "--stop=hij") == "abcdefg\n"


def test_top_k_top_p_and_min_p_can_leave_one_token(trained):
    for setting in ("--top_k=1", "--top_p=0.0", "--min_p=1.0"):
        assert sample(trained, "--start=abc", setting, "--temperature=1.0", "--max_new_tokens=5") == "abcdefgh\n"


def test_a_temperature_near_0_is_greedy(trained):
    for setting in ("--temperature=1e-30", "--temperature=1e-40", "--temperature=5e-324"):
        assert sample(trained, "--start=abc", setting, "--max_new_tokens=5") == "abcdefgh\n"


def test_many_samples_are_sampled_in_batches_and_no_memory_is_one_line(trained):
    text = sample(trained, "--start=abc", "--num_samples=5", "--batch_size=2", "--temperature=0", "--max_new_tokens=1")
    assert text == 5 * "abcd\n---------------\n"
    with pytest.raises(UserError, match="out of memory .*: lower --batch_size"), explain_memory("--batch_size"):
        torch.empty(2**60)


def test_half_a_surrogate_pair_loses_no_other_completion(trained):
    (trained / "pair.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "c"}\n')
    (trained / "half.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "\\ud83d x"}\n')
    text = sample(trained, "--prompts=pair.jsonl", "--max_new_tokens=3", "--temperature=0")
    assert [json.loads(line)["completion"] for line in text.splitlines()] == ["cde", "def"]
    message = sample(trained, "--prompts=half.jsonl", code=2)  # this vocabulary has letters only
    assert "--prompts=half.jsonl, line 2: character '\ufffd' is not among the 26" in message


def test_every_dtype_and_int8_write_the_alphabet(trained):
    for setting in ("--dtype=float32", "--dtype=bfloat16", "--quantize=int8"):
        text = sample(trained, "--start=abc", "--temperature=0", "--max_new_tokens=12", setting)
        assert text == "abcdefghijklmno\n", setting


def test_a_text_longer_than_the_context_is_written(trained):
    text = sample(trained, "--start=abc", "--temperature=0", "--max_new_tokens=100")
    assert len(text) == 104


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--start=ABC"], "character 'A' is not among the 26"),
        (["--start=abc", "--top_k=27"], "--top_k=27: must be between 0 and 26"),
        (["--start=" + "abc" * 20], "60 tokens, the model's context is 32"),
        (["--temperature=-1", "--start=abc"], "--temperature=-1.0"),
        (["--num_samples=0"], "--num_samples=0"),
        (["--start=FILE:gone.txt"], "gone.txt"),
        (["--out_dir=gone"], "there is no checkpoint gone: there is out"),
        (["--device=tpu"], "--device=tpu"),
        (["--quantize=int4"], "--quantize=int4: choose one of nothing, int8"),
        (["--temprature=1"], "did you mean temperature"),
        (["--chat", "--explain"], "--chat and --explain: give one of them"),
        (["--beams=2", "--num_samples=3"], "--beams=2 finds no more than 2"),
        (["--beams=-1"], "--beams=-1: must be at least 0"),
        (["--prompts=gone.txt"], "--prompts=gone.txt: no such file"),
        (["--prompts=empty.txt"], "there is no prompt in it"),
        (["--prompts=bad.jsonl"], 'bad.jsonl, line 2: not an object with a text "prompt"'),
        (["--prompts=odd.txt"], "--prompts=odd.txt, line 3: character 'A' is not among the 26"),
        (["--prompts=good.txt", "--output=out"], "--output=out is a folder"),
        (["--prompts=good.txt", "--start=a"], "--start=a: --prompts takes no --start"),
        (["--chat", "--start=a"], "--start=a: --chat takes no --start"),
        (["--start=a", "--seed=1180591620717411303424"], "less than 2^63"),
        (["--start=a", "--beams=2", "--length_penalty=1000"], "must be between -10 and 10"),
        (["--prompts=good.txt", "--output=gone/x.jsonl"], "there is no folder gone"),
        (["--chat", "--turns=perhaps"], "--turns=perhaps: choose one of auto, True, False"),
        (["--start=a", "--beams=200000"], "--beams=200000: at most the vocabulary size, 26"),
    ],
)
def test_bad_input_is_refused_in_one_line(trained, arguments, words):
    for name, text in (
        ("empty.txt", "\n\n"),
        ("bad.jsonl", '{"prompt": "a"}\n["b"]\n'),
        ("odd.txt", "abc\n\nABC\n"),
        ("good.txt", "a"),
    ):
        (trained / name).write_text(text)
    message = sample(trained, *arguments, code=2)
    assert message.startswith("error: ") and words in message


def test_without_a_run_the_message_names_the_command_that_trains_one(tmp_path):
    assert "config/quickstart.py" in sample(tmp_path, code=2)


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": {}, "model_args": {}, "config": Evil()}, tmp_path / "evil.pt")
    assert "evil.pt holds the Python object" in sample(tmp_path, "--init_from=evil.pt", code=2)
    assert not (tmp_path / "ran").exists()


def test_nanogpts_checkpoint_is_sampled_with_the_alphabet_of_its_dataset(trained, tmp_path):
    checkpoint = torch.load(trained / "out" / "ckpt.pt", weights_only=True)
    ours = checkpoint["model_args"]
    args = {k: ours[k] for k in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")}
    weights = {"_orig_mod." + n: t for n, t in checkpoint["model"].items()}
    for name in ("_orig_mod.transformer.wte.weight", "_orig_mod.lm_head.weight"):
        weights[name] = weights[name][:26].clone()  # nanoGPT's are not padded
    theirs = {
        "model": weights, "optimizer": {}, "model_args": args, "iter_num": 60, "best_val_loss": torch.tensor(0.5),
        "config": {"dataset": "abc"},
    }  # fmt: skip
    make_nanogpt_chars(tmp_path / "data" / "abc", "abcdefghijklmnopqrstuvwxyz" * 10)
    (tmp_path / "out-abc").mkdir()
    torch.save(theirs, tmp_path / "out-abc" / "ckpt.pt")
    assert sample(tmp_path, "--out_dir=out-abc", "--start=abc", "--temperature=0", "--max_new_tokens=5") == "abcdefgh\n"
    (tmp_path / "data" / "abc" / "meta.pkl").unlink()
    assert "data/abc/meta.pkl" in sample(tmp_path, "--out_dir=out-abc", code=2)


def test_until_holds_back_text_that_may_begin_the_stop_text():
    assert "".join(until(iter(["ab", "c", "de", "f"]), "cd")) == "ab"
    assert "".join(until(iter(["ab", "c", "c", "x"]), "cd")) == "abccx"
    assert "".join(until(iter(["a", "b"]), "")) == "ab"


def test_a_character_of_several_tokens_appears_when_it_is_complete():
    class Bytes:
        def token_bytes(self, i):
            return bytes([i])

    assert list(text_pieces(Bytes(), "é🙂".encode())) == ["", "é", "", "", "", "🙂", ""]


def test_completions_made_before_a_batch_failed_are_kept(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("a\nbb\nccc\n")
    for name, value in dict(prompts=str(tmp_path / "p.txt"), output=str(tmp_path / "o.jsonl"), batch_size=2).items():
        monkeypatch.setattr(script, name, value)

    def batch(rows, stop):
        if len(rows[0]) == 3:
            raise RuntimeError("out of memory")
        return [("x", 1)] * len(rows)

    model = SimpleNamespace(config=SimpleNamespace(block_size=8))
    tokenizer = CharTokenizer("abc")
    with pytest.raises(RuntimeError, match="out of memory"):
        script.complete_file(SimpleNamespace(model=model, tokenizer=tokenizer, batch=batch))
    kept = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert kept == [{"prompt": p, "completion": "x", "tokens": 1} for p in ("a", "bb")]


def test_prompts_of_a_file_are_completed_in_batches_as_they_would_be_alone(trained, tmp_path):
    prompts = ["x", "abc", "mnopqrstuvwxyzabcdefg", "b", "hijkl"]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n\n", encoding="utf-8-sig", newline="\r\n")
    rows = [{"prompt": p, "note": "a\u2028b"} for p in prompts]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    greedy = ("--temperature=0", "--max_new_tokens=7")
    alone = [sample(trained, f"--start={p}", *greedy)[len(p) : -1] for p in prompts]
    expected = [{"prompt": p, "completion": c, "tokens": 7} for p, c in zip(prompts, alone)]
    for name, size in (("p.txt", 2), ("p.jsonl", 16)):
        printed = sample(trained, f"--prompts={tmp_path / name}", f"--batch_size={size}", *greedy)
        assert [json.loads(line) for line in printed.splitlines()] == expected
    out = tmp_path / "made.jsonl"
    options = (f"--prompts={tmp_path / 'p.txt'}", f"--output={out}", "--num_samples=2", "--stop=h")
    printed = sample(trained, *options, *greedy)
    assert "made.jsonl: 10 completions" in printed and len(out.read_text().splitlines()) == 10
    assert json.loads(out.read_text().splitlines()[2]) == {"prompt": "abc", "completion": "defg", "tokens": 7}


def test_explain_shows_the_ten_most_likely_tokens_of_each_step(trained):
    text = sample(trained, "--start=abc", "--explain", "--temperature=0", "--max_new_tokens=3")
    blocks = text.split("\n\n")
    assert [b.splitlines()[0] for b in blocks[:3]] == ["abc|", "abcd|", "abcde|"] and blocks[3] == "abcdef\n"
    for block, sampled in zip(blocks, "def"):
        rows = re.findall(r"^ *([\d.]+)% (#*) *'(.)'(  <- sampled)?$", block, re.M)
        percent = [float(p) for p, *_ in rows]
        assert len(rows) == 10 and percent == sorted(percent, reverse=True) and sum(percent) < 100.6
        assert [t for _, _, t, mark in rows if mark] == [sampled] and max(map(len, block.splitlines())) <= 80
    unlikely = ("--temperature=50", "--top_k=0", "--max_new_tokens=20", "--seed=3")
    assert sample(trained, "--start=abc", "--explain", *unlikely).count("<- sampled") == 20


def test_beam_search_prints_the_most_likely_texts(trained):
    options = ("--start=abc", "--beams=3", "--max_new_tokens=5")
    assert sample(trained, *options) == "abcdefgh\n"
    two = sample(trained, *options, "--num_samples=2")
    scores = [float(x) for x in re.findall(r"score (-[\d.]+)", two)]
    assert two.startswith("abcdefgh\n") and len(scores) == 2 and scores[0] > scores[1]


def chat(folder, typed, *arguments):
    return sample(folder, "--chat", "--temperature=0", "--max_new_tokens=4", *arguments, stdin=typed)


def test_a_chat_with_a_plain_model_continues_the_text(trained):
    text = chat(trained, "abc\nwxy\n")
    assert "continues your text (it is no chat model)" in text
    assert re.findall(r"assistant> (.*)", text) == ["defg", "zabc"]


def test_the_commands_of_a_chat(trained, tmp_path):
    typed = "/help\n/temp 5\n/seed 7\nabc\n/reset\n/seed 7\nabc\n/reset\n/temp 0\n/max 2\nabc\n/nonsense\n/top_p 7\nABC\nquit\nabc\n"
    text = chat(trained, typed)
    answers = re.findall(r"assistant> (.*)", text)
    assert len(answers) == 3 and answers[0] == answers[1] and answers[2] == "de"
    assert "/system TEXT" in text and "error: /nonsense is not a command" in text
    assert (
        "error: /top_p 7: a number from 0 to 1" in text
        and "error: the model knows none of the characters 'ABC'" in text
    )


ANSWERS = ("Yes, it is.", "No, it is odd.")
TURNS = "".join(f"User: Is {n} even?\nAssistant: {ANSWERS[n % 2]}\n<|endoftext|>\n" for n in range(200))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A folder with a run that was trained on conversations."""
    folder = tmp_path_factory.mktemp("chatty")
    (folder / "even.txt").write_text(TURNS)
    for argv in (
        ["prepare_text.py", "--inputs=even.txt", "--dataset=even", "--tokenizer=char", "--val_fraction=0.1"],
        ["train.py", *SMALL, "--dataset=even", "--max_iters=300", "--block_size=64", "--n_embd=64", "--eval_interval=0"]
        + ["--batch_size=16", "--learning_rate=1e-2", "--pos=rope", "--sample_prompt=User: Is 1 even?\nAssistant:"],
    ):
        done = call(*argv, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_a_chat_model_answers_in_turns_remembers_and_saves_the_conversation(chatty):
    typed = (
        'Is 12 even?\n"""\nIs\n7 even?\n"""\nIs \\\n31 even?\n/save talk.jsonl\n/save talk.jsonl\n/reset\n'
        "/system It is so.\nIs 44 even?\n/save two.jsonl\nexit\n"
    )
    for name in ("talk.jsonl", "two.jsonl"):
        (chatty / name).unlink(missing_ok=True)
    text = sample(chatty, "--chat", "--turns=True", "--temperature=0", "--max_new_tokens=30", stdin=typed)
    assert "The model answers in turns." in text
    answers = re.findall(r"assistant> (.*)", text)
    assert answers[0] == ANSWERS[0] and len(answers) == 4, text
    assert "the file exists already" in text and "no longer fit the context of 64 tokens" in text
    saved = json.loads((chatty / "talk.jsonl").read_text())["messages"]
    asked = ["Is 12 even?", "Is\n7 even?", "Is \n31 even?"]  # the whole conversation, not only what fits the context
    assert [m["content"] for m in saved[::2]] == asked and saved[1]["content"] == ANSWERS[0]
    before, two = (json.loads(line)["messages"] for line in (chatty / "two.jsonl").read_text().splitlines())
    assert before == saved and len(two) == 3  # what /reset ended is a conversation of its own
    assert two[0] == {"role": "system", "content": "It is so."} and two[-2]["content"] == "Is 44 even?"


def test_whether_a_model_is_a_chat_model_is_known_from_its_dataset(chatty):
    plain = sample(chatty, "--chat", stdin="/quit\n")
    assert "it is no chat model" in plain
    run = torch.load(chatty / "out" / "best.pt", weights_only=True)
    assert run["is_chat"] is False
    (chatty / "marked").mkdir(exist_ok=True)
    for marked in (run | {"is_chat": True}, {k: v for k, v in run.items() if k != "is_chat"} | {"turns": True}):
        torch.save(marked, chatty / "marked" / "best.pt")  # the latter is an older checkpoint's
        assert "answers in turns" in sample(chatty, "--chat", "--out_dir=marked", stdin="exit\n")


def test_on_a_terminal_ctrl_d_leaves(trained):
    typed = [("user> ", "abd\x7fc\r"), ("defg\r\nuser> ", "\x04")]
    arguments = ("--device=cpu", "--chat", "--temperature=0", "--max_new_tokens=4")
    done, shown = call_on_terminal("sample.py", *arguments, cwd=trained, typed=typed)
    assert done.returncode == 0 and "assistant> defg" in shown, shown


def test_ctrl_c_stops_an_answer_and_the_chat_continues(trained):
    options = ("--device=cpu", "--chat", "--max_new_tokens=1000000")
    talk = Script("sample.py", *options, cwd=trained, stdin="abc\n/max 3\n/temp 0\n/reset\nabc\n/quit\n")
    deadline = time.monotonic() + 60
    while "assistant> " not in talk.stdout and time.monotonic() < deadline:
        time.sleep(0.05)
    talk.kill(signal.SIGINT)
    assert talk.wait().returncode == 0 and "(stopped)" in talk.stdout and "assistant> def\n" in talk.stdout


def test_ctrl_c_keeps_the_completions_that_are_done(trained, tmp_path):
    (tmp_path / "p.txt").write_text("abc\n" * 4000)
    out = tmp_path / "made.jsonl"
    options = (f"--prompts={tmp_path / 'p.txt'}", f"--output={out}", "--max_new_tokens=50", "--batch_size=4")
    writing = Script("sample.py", "--device=cpu", *options, cwd=trained)
    deadline = time.monotonic() + 60
    while "newest run" not in writing.stderr and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(3)
    writing.kill(signal.SIGINT)
    assert writing.wait().returncode == 130, writing.stderr
    assert "completions of 4,000" in writing.stdout and 0 < len(out.read_text().splitlines()) < 4000


def test_stop_applies_to_explain_and_chat(trained, chatty):
    explained = sample(trained, "--start=abc", "--explain", "--temperature=0", "--stop=f", "--max_new_tokens=9")
    assert explained.endswith("\nabcde\n") and "'f'  <- sampled" in explained
    talk = ("--chat", "--turns=True", "--temperature=0", "--stop=,", "--max_new_tokens=20")
    assert "assistant> Yes\n" in sample(chatty, *talk, stdin="Is 12 even?\n/quit\n")


def test_a_chat_survives_odd_settings_and_does_not_save_an_empty_conversation(trained):
    text = chat(trained, "/save x.txt\n/temp 1e-44\nabc\n/temp 0\nabc\n/quit\n")
    assert "there is no conversation yet" in text and "defg" in text


def test_a_missing_run_folder_is_named_and_not_taken_for_a_model_of_the_hub(refused):
    assert "there is no checkpoint out/none" in refused("sample.py", "--out_dir=out/none")
