"""demo.py's page, in a real browser (Debian's chromium)."""

import http.client
import json
import shutil
import signal
import socket
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

from conftest import SMALL, Script, call, make_nanogpt_chars

import pytest

GRADIO = ["gradio"]  # its import takes longer than these scripts
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run that has learned the alphabet, and a damaged run."""
    folder = tmp_path_factory.mktemp("demo")
    make_nanogpt_chars(folder / "data" / "abc", ALPHABET * 100)
    done = call(
        "train.py", *SMALL, "--dataset=abc", "--max_iters=80", "--learning_rate=1e-2", "--eval_interval=40",
        "--block_size=64", "--pos=rope", "--out_dir=out/abc", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "out" / "broken").mkdir()
    (folder / "out" / "broken" / "best.pt").write_bytes((folder / "out" / "abc" / "best.pt").read_bytes()[:3000])
    return folder


class Demo:
    """demo.py on a free port."""

    def __init__(self, folder, *arguments):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.script = Script("demo.py", f"--port={self.port}", "--device=cpu", *arguments, cwd=folder, preload=GRADIO)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and "shows the page" not in self.script.stdout:
            time.sleep(0.1)
        assert "shows the page" in self.script.stdout, self.script.stdout + self.script.stderr

    def end(self):
        self.script.kill()
        self.script.wait()


@pytest.fixture(scope="module")
def demo(trained):
    served = Demo(trained, "--out_dir=out/abc")
    yield served
    served.end()


@pytest.fixture(scope="module")
def slow(trained):
    """A page that shows ten tokens a second."""
    served = Demo(trained, "--out_dir=out/abc", "--pace=0.1")
    yield served
    served.end()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_page(browser, demo):
    page = browser.new_page(viewport={"width": 1200, "height": 900}, reduced_motion="reduce")
    page.requests = []
    page.on("request", lambda r: page.requests.append(r.url))
    page.goto(demo.url)
    page.get_by_role("button", name="Generate").wait_for()
    return page


@pytest.fixture(scope="module")
def opened(browser, demo):
    opened = open_page(browser, demo)
    yield opened
    opened.close()


@pytest.fixture
def page(opened):
    """The same page for many tests, because opening it takes seconds. Settings stay as they are."""
    opened.get_by_role("tab", name="Chat").click()
    opened.locator("#new_chat").click()
    opened.locator("#message textarea").fill("")
    opened.get_by_role("tab", name="Write").click()
    return opened


def set_value(page, name, value):
    """Set a field of the settings, which are in a drawer."""
    page.locator("#settings .toggle-button").click()
    page.locator("#settings.open").wait_for()
    box = page.locator(f"#{name} input[type=number], #{name} textarea, #{name} input[type=text]").first
    box.fill(str(value))
    box.press("Tab")
    page.locator("#settings .toggle-button").click()
    page.locator("#settings:not(.open)").wait_for()


def text_of(page, name="text"):
    return page.locator(f"#{name} textarea").input_value()


def eventually(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.05)
    assert condition()


def watch(page, name="text"):
    """Record every value of a text box from here on."""
    page.evaluate(
        """name => {
            const box = document.querySelector(`#${name} textarea`); window.seen = [];
            setInterval(() => { if (window.seen.at(-1) !== box.value) window.seen.push(box.value) }, 1)
        }""",
        name,
    )


def greedy(page):
    set_value(page, "top_k", 1)


def letters_after(start, n):
    at = ALPHABET.index(start[-1]) + 1
    return start + "".join(ALPHABET[(at + k) % 26] for k in range(n))


def test_enter_starts_and_tokens_arrive_one_by_one(browser, slow):
    page = open_page(browser, slow)
    greedy(page)
    set_value(page, "max_new_tokens", 20)
    watch(page)
    page.locator("#prompt textarea").fill("abc")
    page.keyboard.press("Enter")
    eventually(lambda: text_of(page) == letters_after("abc", 20))
    seen = [s for s in page.evaluate("window.seen") if s]
    assert all(b.startswith(a) for a, b in zip(seen, seen[1:]))
    assert sum(len(b) - len(a) == 1 for a, b in zip(seen, seen[1:])) >= 15, seen
    eventually(lambda: "20 tokens" in page.locator("#speed").inner_text())
    page.close()


def test_sliders_and_seed_change_the_text(page):
    page.locator("#prompt textarea").fill("abc")
    set_value(page, "max_new_tokens", 10)

    def written():
        page.get_by_role("button", name="Generate").click()
        page.wait_for_timeout(300)
        eventually(lambda: len(text_of(page)) == 13)
        return text_of(page)

    greedy(page)
    assert written() == letters_after("abc", 10)
    set_value(page, "top_k", 0)
    set_value(page, "temperature", 2.0)
    set_value(page, "seed", 5)
    text = written()
    assert text != letters_after("abc", 10) and written() == text
    set_value(page, "seed", 6)
    assert written() != text
    set_value(page, "top_p", 0)
    assert written() == letters_after("abc", 10)
    set_value(page, "top_p", 1)


def test_stop_ends_the_text(browser, slow):
    page = open_page(browser, slow)
    page.locator("#prompt textarea").fill("abc")
    set_value(page, "max_new_tokens", 500)
    page.get_by_role("button", name="Generate").click()
    eventually(lambda: len(text_of(page)) > 8)
    page.locator("#prompt").get_by_role("button", name="Stop").click()
    page.locator("#prompt").get_by_role("button", name="Generate").wait_for()
    page.wait_for_timeout(300)
    stopped = text_of(page)
    page.wait_for_timeout(500)
    assert text_of(page) == stopped and len(stopped) < 100
    page.close()


def test_two_visitors_are_served_at_once(browser, slow):
    pages = [open_page(browser, slow) for _ in range(2)]
    starts = ("abc", "xyz")
    for page, start in zip(pages, starts):
        greedy(page)
        set_value(page, "max_new_tokens", 40)
        page.locator("#prompt textarea").fill(start)
    for page in pages:
        page.get_by_role("button", name="Generate").click()
    eventually(lambda: all(len(text_of(page)) > 3 for page in pages))
    assert all(len(text_of(page)) < 43 for page in pages)  # neither waits until the other is done
    eventually(lambda: [text_of(page) for page in pages] == [letters_after(start, 40) for start in starts])
    for page in pages:
        page.close()


def test_long_prompts_and_unknown_characters_are_reported(page):
    box = page.locator("#prompt textarea")
    box.fill("a" * 1_000_000)
    box.press("Enter")
    page.get_by_text("The text has 1,000,000 characters; at most 20,000 are taken.").wait_for()
    box.fill("ABC")
    box.press("Enter")
    page.get_by_text("character 'A' is not among the 26").wait_for()
    greedy(page)
    set_value(page, "max_new_tokens", 10)
    box.fill(ALPHABET * 20)
    box.press("Enter")
    eventually(lambda: text_of(page) == ALPHABET * 20 + ALPHABET[:10])
    assert "the last 64 of the prompt's 520 tokens" in page.locator("#write_notice").inner_text()
    assert page.locator(".error").count() == 0  # a message in place, no box over the page


def test_a_damaged_checkpoint_is_reported_and_the_old_model_stays(page):
    page.locator("#run input").click()
    page.get_by_role("option", name="broken").click()
    page.locator("#run_notice").get_by_text("best.pt is damaged").first.wait_for()
    eventually(lambda: page.locator("#run input").input_value().startswith("abc · loss 0."))
    greedy(page)
    set_value(page, "max_new_tokens", 10)
    page.locator("#prompt textarea").fill("abc")
    page.keyboard.press("Enter")
    eventually(lambda: text_of(page) == letters_after("abc", 10))


def test_a_checkpoint_damaged_while_it_is_shown_is_reported_and_the_loaded_model_stays(browser, trained):
    shutil.copytree(trained / "out" / "abc", trained / "out" / "live")
    served = Demo(trained, "--out_dir=out/live")
    page = open_page(browser, served)
    best = trained / "out" / "live" / "best.pt"
    best.write_bytes(best.read_bytes()[:2000])
    greedy(page)
    set_value(page, "max_new_tokens", 10)
    page.locator("#prompt textarea").fill("abc")
    page.keyboard.press("Enter")
    page.get_by_text("The model from before stays").first.wait_for()
    eventually(lambda: text_of(page) == letters_after("abc", 10))
    page.close()
    served.end()
    shutil.rmtree(trained / "out" / "live")


def test_the_next_token_tab_shows_the_likely_tokens_and_marks_the_one_that_was_taken(page):
    page.get_by_role("tab", name="Next token").click()
    greedy(page)
    page.locator("#grown textarea").fill("abc")
    page.locator("#one").click()
    eventually(lambda: text_of(page, "grown") == "abcd")
    assert page.locator("#could tr.taken").inner_text().split()[0] == "'d'"
    shares = [float(cell.rstrip("%")) for cell in page.locator("#could td:nth-child(3)").all_inner_texts()]
    assert shares == sorted(shares, reverse=True) and min(shares) >= 1 and sum(shares) < 100.1
    set_value(page, "top_k", 0)
    set_value(page, "temperature", 2)
    for seed in range(20):  # hot sampling takes a token below 1 % sooner or later: it is shown all the same
        set_value(page, "seed", seed)
        page.locator("#grown textarea").fill("abc")
        page.locator("#one").click()
        eventually(lambda: len(text_of(page, "grown")) == 4)
        taken = text_of(page, "grown")[3]
        eventually(lambda c=taken: repr(c) in page.locator("#could tr.taken").inner_text())
        if taken != "d":
            break
    assert taken != "d"
    greedy(page)
    set_value(page, "max_new_tokens", 10)
    page.locator("#grown textarea").fill("abcd")
    page.locator("#many").click()
    eventually(lambda: text_of(page, "grown") == letters_after("abcd", 10))
    page.locator("#still").wait_for(state="hidden")  # Stop is there only while something runs


def say(page, text):
    page.locator("#message").get_by_role("button", name="Send").wait_for()  # until then Enter keeps what is typed
    page.locator("#message textarea").fill(text)
    page.keyboard.press("Enter")


def bubbles(page):
    return page.locator("#talked .message").all_inner_texts()


def test_chat_continues_the_conversation_until_a_new_chat(page):
    page.get_by_role("tab", name="Chat").click()
    page.get_by_text("This is no chat model: it continues your text.").wait_for()
    greedy(page)
    set_value(page, "max_new_tokens", 10)
    for said, answer in (("abc", "defghijklm"), ("nop", "qrstuvwxyz")):
        say(page, said)
        page.locator("#talked").get_by_text(answer, exact=True).wait_for()
        eventually(lambda: page.locator("#message textarea").input_value() == "")
    say(page, "  ")
    page.wait_for_timeout(500)
    assert "qrstuvwxyz" in page.locator("#talked").inner_text()
    page.locator("#new_chat").click()
    eventually(lambda: "defghijklm" not in page.locator("#talked").inner_text())


def test_a_message_is_edited_an_answer_retried_and_the_last_exchange_undone(page):
    page.get_by_role("tab", name="Chat").click()
    greedy(page)
    set_value(page, "max_new_tokens", 10)
    for said, answer in (("abc", "defghijklm"), ("nop", "qrstuvwxyz")):
        say(page, said)
        page.locator("#talked").get_by_text(answer, exact=True).wait_for()
        page.locator("#message").get_by_role("button", name="Send").wait_for()
    talked = page.locator("#talked")
    talked.locator("button[title='Retry'], button[aria-label='Retry']").last.click()
    page.wait_for_timeout(1000)
    eventually(lambda: bubbles(page) == ["abc", "defghijklm", "nop", "qrstuvwxyz"])
    talked.locator("button[title='Undo'], button[aria-label='Undo']").last.click()
    eventually(lambda: bubbles(page) == ["abc", "defghijklm"])
    assert page.locator("#message textarea").input_value() == "nop"
    talked.locator("button[title='Edit'], button[aria-label='Edit']").first.click()
    talked.locator("textarea").fill("fgh")
    talked.locator("button[title='Submit'], button[aria-label='Submit']").first.click()
    eventually(lambda: bubbles(page) == ["fgh", "ijklmnopqr"])


def test_an_error_in_the_chat_is_a_message_and_keeps_what_was_typed(page):
    page.get_by_role("tab", name="Chat").click()
    say(page, "ABC")
    page.locator("#chat_notice").get_by_text("none of the characters 'ABC'").wait_for()
    assert page.locator("#message textarea").input_value() == "ABC"
    say(page, "abC")
    page.locator("#chat_notice").get_by_text("does not know 'C': left out").wait_for()


def test_typing_during_an_answer_is_kept_and_a_new_chat_ends_the_answer(browser, slow):
    page = open_page(browser, slow)
    page.get_by_role("tab", name="Chat").click()
    greedy(page)
    say(page, "abc")
    page.locator("#talked").get_by_text("def").first.wait_for()
    page.locator("#message textarea").press_sequentially("what next", delay=100)
    assert page.locator("#message textarea").input_value() == "what next"
    page.locator("#message").get_by_role("button", name="Stop").click()
    page.locator("#message").get_by_role("button", name="Send").wait_for()
    assert page.locator("#message textarea").input_value() == "what next"
    assert "def" in page.locator("#talked").inner_text()
    page.locator("#new_chat").click()
    eventually(lambda: "def" not in page.locator("#talked").inner_text())
    say(page, "abc")
    page.locator("#talked").get_by_text("def").first.wait_for()
    page.locator("#new_chat").click()
    page.wait_for_timeout(1000)
    assert "def" not in page.locator("#talked").inner_text()
    page.locator("#message").get_by_role("button", name="Send").wait_for()
    page.close()


def test_another_model_or_one_token_ends_what_is_running(browser, trained, slow):
    shutil.copytree(trained / "out" / "abc", trained / "out" / "other")
    page = open_page(browser, slow)
    page.get_by_role("tab", name="Next token").click()
    set_value(page, "max_new_tokens", 500)
    greedy(page)
    page.locator("#grown textarea").fill("abc")
    page.locator("#many").click()
    eventually(lambda: len(text_of(page, "grown")) > 6)
    page.locator("#one").click()
    page.locator("#still").wait_for(state="hidden")
    ended = text_of(page, "grown")
    page.wait_for_timeout(1000)
    assert text_of(page, "grown") == ended
    page.get_by_role("tab", name="Chat").click()
    page.locator("#refresh").click()
    say(page, "abc")
    page.locator("#talked").get_by_text("def").first.wait_for()
    page.locator("#run input").click()
    page.get_by_role("option", name="other").click()
    eventually(lambda: page.locator("#run input").input_value().startswith("other"))
    page.locator("#message").get_by_role("button", name="Send").wait_for()
    page.wait_for_timeout(1000)
    assert "def" not in page.locator("#talked").inner_text()
    page.close()
    shutil.rmtree(trained / "out" / "other")


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_tabs_and_input_are_above_the_fold(browser, demo, size):
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    page.goto(demo.url)
    for tab in ("Write", "Next token", "Loss", "Chat"):
        page.get_by_role("tab", name=tab).click()
    say(page, "abc")
    page.locator("#talked").get_by_text("def").first.wait_for()
    box = page.locator("#message textarea").bounding_box()
    assert box["y"] + box["height"] <= size[1], box
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    page.close()


def test_an_invalid_seed_is_reported(page):
    for seed in ("99999999999999999999999", "seven"):
        set_value(page, "seed", seed)
        page.get_by_role("button", name="Generate").click()
        page.get_by_text(f"The seed {seed} is not a whole number").first.wait_for()
    set_value(page, "seed", 5)


def test_the_loss_tab_shows_several_runs_and_follows_one_that_trains(browser, trained):
    run = trained / "out" / "growing"
    run.mkdir()
    for name in ("best.pt", "config.json"):
        shutil.copy(trained / "out" / "abc" / name, run)
    lines = [json.dumps({"step": n, "tokens": n, "val_loss": 3 - n / 10}) + "\n" for n in (1, 2, 3, 4)]
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    served = Demo(trained, "--out_dir=out/abc")
    page = open_page(browser, served)
    page.get_by_role("tab", name="Loss").click()
    page.locator("#curve svg").first.wait_for()

    def picture():
        page.wait_for_timeout(300)
        return page.evaluate("document.querySelector('#curve svg')?.innerHTML")

    eventually(picture)
    one = picture()
    assert "validation loss, nats per token (lower is better)" in page.locator("#results").inner_text()
    page.locator("#compared input").click()
    page.get_by_role("option", name="growing").click()
    eventually(lambda: "growing" in (picture() or ""))  # in the legend: the plot knows the new run
    assert "growing" not in one and "growing" in page.locator("#results").inner_text()
    page.wait_for_timeout(1000)
    two = picture()
    (run / "metrics.jsonl").write_text("".join(lines))
    eventually(lambda: picture() not in (two, None))  # without a click: the page looks every five seconds
    page.close()
    served.end()
    shutil.rmtree(run)


def test_no_request_leaves_the_machine(page):
    for tab in ("Chat", "Next token", "Loss", "Write"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(200)
    hosts = {urlparse(url).hostname for url in page.requests if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}


def test_without_a_run_the_page_says_how_to_train_one_and_finds_it_later(browser, trained, tmp_path):
    served = Demo(tmp_path)
    page = open_page(browser, served)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("python train.py config/quickstart.py").first.wait_for()
    shutil.copytree(trained / "out" / "abc", tmp_path / "out" / "abc")
    page.locator("#refresh").click()
    eventually(lambda: page.locator("#run input").input_value().startswith("abc"))
    greedy(page)
    set_value(page, "max_new_tokens", 10)
    page.locator("#prompt textarea").fill("abc")
    page.keyboard.press("Enter")
    eventually(lambda: text_of(page) == letters_after("abc", 10))
    page.close()
    served.end()


def test_it_listens_on_its_address_only(demo, refused):
    def answers(address):
        try:
            http.client.HTTPConnection(address, demo.port, timeout=5).request("GET", "/")
        except ConnectionRefusedError:
            return False
        return True

    assert answers("127.0.0.1") and not answers("127.0.0.2")  # a server on all addresses would answer on both
    assert f"--port={demo.port}: cannot listen there" in refused("demo.py", f"--port={demo.port}", preload=GRADIO)
    assert "--port=70000: must be between 1 and 65535" in refused("demo.py", "--port=70000", preload=GRADIO)
    assert "there is no checkpoint gone" in refused("demo.py", "--out_dir=gone", preload=GRADIO)


def post(url: str, data, **headers):
    """(status, body) of a POST request; data is sent as JSON unless it is bytes."""
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def test_nothing_is_kept_of_an_upload(demo, tmp_path):
    data = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="big.txt"\r\n\r\n'
        + b"a" * 10**6
        + b"\r\n--x--\r\n"
    )
    status, body = post(f"{demo.url}/gradio_api/upload", data, **{"Content-Type": "multipart/form-data; boundary=x"})
    assert status == 413, body
    kept = [p for p in Path(tempfile.gettempdir(), "gradio").rglob("big.txt")]
    assert not kept


def test_a_visitors_error_is_a_message_and_nothing_in_the_servers_log(page, demo):
    page.locator("#prompt textarea").fill("ABC")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("character 'A' is not among").first.wait_for()
    assert "Traceback" not in demo.script.stderr + demo.script.stdout


def test_a_name_and_a_password_can_be_asked_for(trained, refused):
    served = Demo(trained, "--out_dir=out/abc", "--auth=me:secret:word")
    assert post(f"{served.url}/gradio_api/queue/join", {})[0] == 401
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert post(f"{served.url}/login", b"username=me&password=wrong", **form)[0] == 400
    assert post(f"{served.url}/login", b"username=me&password=secret%3Aword", **form)[0] == 200
    served.end()
    assert "--auth: give a name and a password" in refused("demo.py", "--auth=me", preload=GRADIO)


def test_ctrl_c_ends_the_page_while_it_is_open_in_a_browser(trained, browser):
    served = Demo(trained, "--out_dir=out/abc")
    page = open_page(browser, served)
    served.script.kill(signal.SIGINT)
    assert served.script.wait().returncode == 130
    page.close()
