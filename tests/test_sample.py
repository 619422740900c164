import pytest
import torch
from conftest import SMALL, call, make_nanogpt_chars

from sample import text_pieces, until


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


def sample(folder, *arguments, code=0):
    done = call("sample.py", "--device=cpu", *arguments, cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr.strip().splitlines()[-1]


def test_the_run_folder_is_all_it_takes(trained, tmp_path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "best.pt").write_bytes((trained / "out" / "best.pt").read_bytes())
    text = sample(tmp_path, "--out_dir=alone", "--start=abc", "--temperature=0", "--max_new_tokens=10")
    assert text == "abcdefghijklm\n"


def test_streamed_and_batched_samples_and_a_prompt_file(trained, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("xyzab")
    one = sample(trained, f"--start=FILE:{prompt}", "--temperature=0", "--max_new_tokens=4")
    assert one == "xyzabcdef\n"
    three = sample(trained, "--start=mno", "--temperature=0", "--max_new_tokens=4", "--num_samples=3")
    assert three == "mnopqrs\n---------------\n" * 3


def test_the_seed_decides_and_another_gives_another_text(trained):
    options = ("--start=a", "--temperature=3.0", "--max_new_tokens=40", "--top_k=0")
    first, again = sample(trained, *options), sample(trained, *options)
    assert first == again != sample(trained, *options, "--seed=7")


def test_a_stop_text_ends_the_sample_and_is_not_part_of_it(trained):
    assert sample(trained, "--start=abc", "--temperature=0", "--max_new_tokens=20", "--stop=hij") == "abcdefg\n"


def test_settings_narrow_the_choice(trained):
    for setting in ("--top_k=1", "--top_p=0.0", "--min_p=1.0"):
        assert sample(trained, "--start=abc", setting, "--temperature=1.0", "--max_new_tokens=5") == "abcdefgh\n"


def test_every_precision_writes_the_alphabet(trained):
    for setting in ("--dtype=float32", "--dtype=bfloat16", "--quantize=int8"):
        text = sample(trained, "--start=abc", "--temperature=0", "--max_new_tokens=12", setting)
        assert text == "abcdefghijklmno\n", setting


def test_text_longer_than_the_context_is_written(trained):
    text = sample(trained, "--start=abc", "--temperature=0", "--max_new_tokens=100")
    assert len(text) == 104


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--start=ABC"], "character 'A' is not among the 26"),
        (["--start=abc", "--top_k=27"], "--top_k=27: must be between 0 (all) and the vocabulary, 26"),
        (["--start=" + "abc" * 20], "60 tokens, the model's context is 32"),
        (["--temperature=-1"], "--temperature=-1.0"),
        (["--num_samples=0"], "--num_samples=0"),
        (["--start=FILE:gone.txt"], "gone.txt"),
        (["--out_dir=gone"], "there is no checkpoint gone"),
        (["--device=tpu"], "--device=tpu"),
        (["--quantize=int4"], "--quantize=int4: choose int8"),
        (["--temprature=1"], "did you mean temperature"),
    ],
)
def test_bad_input_is_told_in_one_line(trained, arguments, words):
    message = sample(trained, *arguments, code=2)
    assert message.startswith("error: ") and words in message


def test_without_a_run_the_command_that_makes_one_is_named(tmp_path):
    assert "config/quickstart.py" in sample(tmp_path, code=2)


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": {}, "model_args": {}, "config": Evil()}, tmp_path / "evil.pt")
    assert "evil.pt holds the Python object" in sample(tmp_path, "--init_from=evil.pt", code=2)
    assert not (tmp_path / "ran").exists()


def test_nanogpts_checkpoint_is_sampled_with_its_datasets_alphabet(trained, tmp_path):
    payload = torch.load(trained / "out" / "ckpt.pt", weights_only=True)
    ours = payload["model_args"]
    args = {k: ours[k] for k in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")}
    weights = {"_orig_mod." + n: t for n, t in payload["model"].items()}
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


def test_until_holds_back_what_may_be_the_stop_text():
    assert "".join(until(iter(["ab", "c", "de", "f"]), "cd")) == "ab"
    assert "".join(until(iter(["ab", "c", "c", "x"]), "cd")) == "abccx"
    assert "".join(until(iter(["a", "b"]), "")) == "ab"


def test_a_character_spread_over_tokens_appears_when_it_is_whole():
    class Bytes:
        def token_bytes(self, i):
            return bytes([i])

    assert list(text_pieces(Bytes(), "é🙂".encode())) == ["", "é", "", "", "", "🙂", ""]
