"""bench.py: it runs, and says what it measured. How fast is for people to read, not for tests to hold."""

import re

from conftest import TEXT


def test_data_mode_holds_our_way_beside_the_bare_tokenizer(run, tmp_path):
    (tmp_path / "text.txt").write_text("<|endoftext|>".join([TEXT[:2000]] * 20))
    for more in ([], ["--input=text.txt"]):
        printed = run("bench.py", "--mode=data", "--megabytes=1", "--repeat=1", *more)
        rates = re.findall(r"([\d,.]+)M tokens/s \(", printed)
        assert len(rates) == 4 and all(float(r.replace(",", "")) > 0 for r in rates), printed
        assert re.search(r"[\d.]+ x \d+ cores? of that", printed)


def test_bad_input_is_told_in_one_line(refused):
    assert "--mode=speed: choose data" in refused("bench.py", "--mode=speed")
    assert "--input=gone.txt: there is no such file" in refused("bench.py", "--input=gone.txt")
    assert "at least 1" in refused("bench.py", "--megabytes=0")
