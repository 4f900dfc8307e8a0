"""The chat page in a real browser, over a real server: it shows what the server says, and nothing else happens."""

import json
import os
import re
import shutil
import threading
import urllib.request
from time import monotonic

import pytest
from oracles import scramble
from playwright.sync_api import expect, sync_playwright
from web.hubs import running

from deltaw.adapters.adapter import Adapter
from deltaw.api.persona import load_base
from deltaw.files import adapters
from deltaw.methods import method
from deltaw.settings import Serving

PATIENCE = 8
KEY = "sesame"
ODD = "<b>bold<img src=x onerror=alert(1)>"
"""A persona's name, as far as a file may have it."""
SAID = "<img src=x onerror=alert(1)>\n<b>bold</b> & <script>alert(2)</script>"
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def chromium():
    found = shutil.which("chromium")
    assert found, "These tests need Chromium (on Debian: apt-get install chromium)."
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def base(tiny_path):
    return load_base(str(tiny_path), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def put_up(base, tmp_path_factory):
    """A function that puts an adapter into the folder that is served, and that folder."""
    folder = tmp_path_factory.mktemp("personas")

    def put(name, seed, system="", fingerprint=base.fingerprint):
        adapter = scramble(Adapter.build(method("lora", rank=4), base.model, seed).eval(), 0.2, seed)
        header = adapters.Header.of(adapter, "tiny", fingerprint, system)
        adapters.save(adapter, header, folder / f"{name}.safetensors")

    return put, folder


@pytest.fixture(scope="module")
def server(base, put_up, tmp_path_factory):
    """Two personas, one with an odd name, and one of another base: the address, and the hub."""
    put, folder = put_up
    put("poet", 1, system="You rhyme.")
    put("chef", 2)
    put(ODD, 3)
    put("stranger", 4, fingerprint="0" * 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAW_CACHE", str(tmp_path_factory.mktemp("cache")))
        with running(base, [folder]) as (url, hub):
            yield url, hub


class Talk:
    """What somebody does with the page; `faults` are the browser's complaints, `asked` the addresses it went to."""

    def __init__(self, page, url):
        self.page, self.url, self.faults, self.asked = page, url, [], []
        page.on("console", lambda said: self.faults.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("dialog", lambda dialog: self.faults.append(dialog.message))
        page.on("request", lambda request: self.asked.append(request.url))
        self.question = page.get_by_label("Your message")
        self.answers = page.get_by_role("article")
        self.send, self.stop = (page.get_by_role("button", name=name) for name in ("Send", "Stop"))

    def open(self):
        self.page.goto(self.url)
        expect(self.who()).to_be_visible()
        return self

    def who(self, at=0):
        return self.page.get_by_role("combobox", name="Who answers").nth(at)

    def choose(self, name, at=0):
        self.who(at).fill(name)
        self.who(at).press("Enter")

    def settings(self, **told):
        self.page.get_by_text("Settings", exact=True).click()
        for label, value in {"Temperature": "0", "Longest_answer": "24", **told}.items():
            self.page.get_by_label(label.replace("_", " ")).fill(value)

    def ask(self, text):
        self.question.fill(text)
        self.question.press("Enter")

    def answer(self, at=-1):
        """The whole of an answer, once there is one."""
        expect(self.send).to_be_visible()
        expect(self.answers.nth(at)).to_have_attribute("aria-busy", "false")
        return self.answers.nth(at).locator(".text").text_content()

    def begun(self):
        """What there is of an answer, as soon as there is any."""
        until(lambda: self.answers.last.locator(".text").text_content())
        return self.answers.last.locator(".text").text_content()

    def name(self, at=-1):
        return self.answers.nth(at).locator(".who").text_content()

    def why(self, at=-1):
        return self.answers.nth(at).locator(".note")


def opened(chromium, url, **context):
    """A page that is closed at the end, having gone nowhere else and complained of nothing."""
    context = chromium.new_context(**context)
    context.set_default_timeout(1000 * PATIENCE)
    expect.set_options(timeout=1000 * PATIENCE)
    talk = Talk(context.new_page(), url)
    yield talk
    context.close()
    assert talk.faults == []
    assert [url for url in talk.asked if not url.startswith((f"{talk.url}/", "data:"))] == []


@pytest.fixture
def talk(chromium, server):
    for talk in opened(chromium, server[0]):
        yield talk.open()


def api(url, model, *turns, **more):
    """What the server says by itself."""
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    body = json.dumps({"model": model, "messages": messages, **GREEDY, **more}).encode()
    asked = urllib.request.Request(f"{url}/v1/chat/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=PATIENCE) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


def models(url):
    with urllib.request.urlopen(f"{url}/v1/models", timeout=PATIENCE) as reply:
        return [card["id"] for card in json.load(reply)["data"]]


def until(true):
    """Wait for something that the browser does not see."""
    end, pause = monotonic() + PATIENCE, threading.Event()
    while not true():
        assert monotonic() < end
        pause.wait(0.01)


def held(hub):
    """Pages that answers have."""
    return hub.service.do(lambda: sum(hub.service.engine.arena.held.values())).result(PATIENCE)


@pytest.fixture
def slow(server, monkeypatch):
    """A function that lets the engine go so many steps and no further; it still hears what it is told."""
    engine, left = server[1].service.engine, [0]
    step, pause = engine.step, threading.Event()

    def walk():
        if left[0] <= 0:
            pause.wait(0.001)
            return True
        left[0] -= 1
        return step()

    def go(steps):
        left[0] = steps

    monkeypatch.setattr(engine, "step", walk)
    yield go
    left[0] = 10**9


def test_personas_are_listed_base_first_and_who_cannot_be_asked_says_why(talk, server):
    hub = server[1]
    talk.who().click()
    options = talk.page.get_by_role("option")
    expect(options).to_have_count(5)
    expect(options.first).to_contain_text(hub.name)
    expect(options.first).to_contain_text("the base, as it is")
    expect(options.filter(has_text="chef")).to_contain_text("lora · rank 4")
    stranger = options.filter(has_text="stranger")
    expect(stranger).to_contain_text("Not available: It was made for another base: 'tiny'.")
    expect(stranger).to_have_attribute("aria-disabled", "true")
    stranger.click(force=True)
    expect(talk.who()).to_have_value(hub.name)
    options.filter(has_text="chef").click()
    expect(talk.who()).to_have_value("chef")
    expect(options).to_have_count(0)


def test_a_name_is_text_whatever_it_looks_like(talk, server):
    talk.settings()
    talk.choose(ODD)
    expect(talk.who()).to_have_value(ODD)
    talk.ask("a")
    assert talk.answer() == api(server[0], ODD, "a")
    assert talk.name() == ODD
    talk.who().click()
    expect(talk.page.get_by_role("option").filter(has_text=ODD)).to_have_count(1)
    assert talk.page.locator("main img, main b:not(#empty b), .voice img, .voice b").count() == 0


def test_an_answer_streams_and_is_what_the_server_says(talk, server, slow):
    url, hub = server
    talk.settings()
    slow(4)
    talk.ask("Tell me\nof a deer.")
    begun = talk.begun()
    expect(talk.stop).to_be_visible()
    slow(10**9)
    whole = talk.answer()
    assert whole == api(url, hub.name, "Tell me\nof a deer.")
    assert whole.startswith(begun)
    assert len(begun) < len(whole)
    assert talk.page.get_by_role("heading", level=2).text_content() == "Tell me\nof a deer."
    expect(talk.question).to_have_value("")
    expect(talk.page.locator("[aria-live=polite]")).to_contain_text(f"{hub.name}: ")


def test_the_conversation_goes_on_with_whoever_is_chosen(talk, server):
    url, hub = server
    said = {name: api(url, name, "a") for name in (hub.name, "poet", "chef", "poet:0.7+chef:0.3")}
    assert len(set(said.values())) == 4
    talk.settings()
    talk.ask("a")
    assert talk.answer() == said[hub.name]
    talk.choose("poet")
    talk.ask("b")
    assert talk.answer(1) == api(url, "poet", "a", said[hub.name], "b")
    assert [talk.name(0), talk.name(1)] == [hub.name, "poet"]
    talk.page.get_by_role("button", name="New conversation").click()
    expect(talk.answers).to_have_count(0)
    talk.choose("poet:0.7+chef:0.3")
    expect(talk.page.get_by_text("a blend of poet and chef")).to_be_visible()
    talk.ask("a")
    assert talk.answer() == said["poet:0.7+chef:0.3"]
    talk.choose("chef")
    talk.page.get_by_role("button", name="Retry").click()
    expect(talk.answers.locator(".who")).to_have_text("chef")
    assert talk.answer() == said["chef"]


def test_settings_reach_the_server(talk, server):
    url, _ = server
    talk.choose("poet")
    talk.settings(Temperature="1.5", Seed="7", Longest_answer="9")
    system = talk.page.get_by_label("System prompt")
    expect(system).to_have_attribute("placeholder", "You rhyme.")
    drawn = {"temperature": 1.5, "seed": 7, "max_tokens": 9}
    talk.ask("a")
    assert talk.answer() == api(url, "poet", "a", **drawn)
    expect(talk.why()).to_have_text("Cut off: Settings says how long an answer may be.")
    system.fill("Be brief.")
    talk.page.get_by_role("button", name="Retry").click()
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    assert talk.answer() == api(url, "poet", messages=told, **drawn)


@pytest.mark.parametrize("way", ["button", "key", "new"])
def test_who_is_stopped_keeps_no_page(talk, server, slow, way):
    talk.settings(Longest_answer="400")
    slow(8)
    talk.ask("a")
    assert talk.begun()
    assert held(server[1]) > 0
    if way == "button":
        talk.stop.click()
    elif way == "key":
        talk.page.keyboard.press("Escape")
    else:
        talk.page.get_by_role("button", name="New conversation").click()
    expect(talk.send).to_be_visible()
    until(lambda: held(server[1]) == 0)
    if way == "new":
        expect(talk.answers).to_have_count(0)
    else:
        expect(talk.why()).to_have_text("Stopped.")
        assert talk.answer()


@pytest.mark.parametrize("whole", [False, True])
def test_an_answer_is_text_whatever_it_looks_like(talk, whole):
    """The server is held to saying it, byte by byte; and in one piece, as a larger vocabulary might have it."""

    def shaped(route):
        if whole:
            piece = {"choices": [{"delta": {"content": SAID}, "finish_reason": "stop"}]}
            route.fulfill(body=f"data: {json.dumps(piece)}\n\ndata: [DONE]\n\n", content_type="text/event-stream")
        else:
            body = {**route.request.post_data_json, "structured_outputs": {"choice": [SAID]}}
            route.continue_(post_data=json.dumps(body))

    talk.page.route("**/v1/chat/completions", shaped)
    talk.settings(Longest_answer="200")
    talk.ask(SAID)
    assert talk.answer() == SAID
    assert talk.page.get_by_role("heading", level=2).text_content() == SAID
    assert talk.answers.locator(".text *").count() == 0


def test_errors_stand_where_the_answer_would_and_the_question_stays(talk, server):
    url = server[0]
    talk.settings()
    talk.who().fill("stranger")
    talk.who().press("Tab")
    expect(talk.page.locator(".voice .note")).to_contain_text("Not available")
    talk.ask("Are you there?")
    expect(talk.why()).to_contain_text("It was made for another base: 'tiny'.")
    talk.choose("nobody")
    talk.page.get_by_role("button", name="Retry").click()
    expect(talk.why()).to_contain_text("There is no persona 'nobody'.")
    talk.page.context.set_offline(True)
    talk.page.get_by_role("button", name="Retry").click()
    expect(talk.why()).to_have_text("The server cannot be reached. Is it still running?")
    expect(talk.page.get_by_role("heading", level=2)).to_have_text("Are you there?")
    talk.page.context.set_offline(False)
    talk.choose("poet")
    talk.page.get_by_role("button", name="Retry").click()
    expect(talk.why()).not_to_have_class(re.compile("bad"))
    assert talk.answer() == api(url, "poet", "Are you there?")
    talk.page.get_by_role("button", name="Edit question").click()
    expect(talk.question).to_have_value("Are you there?")
    expect(talk.answers).to_have_count(0)
    resource = re.compile(r"Failed to load resource: (the server responded with a status of 40|net::ERR_INTERNET)")
    assert all(resource.match(fault) for fault in talk.faults), talk.faults
    talk.faults.clear()


def test_several_are_compared_side_by_side_and_each_goes_on_from_what_it_said(talk, server):
    url, hub = server
    talk.settings()
    more = talk.page.get_by_role("button", name="Compare")
    for at, name in enumerate(["poet", "chef"], 1):
        more.click()
        talk.choose(name, at)
    talk.ask("a")
    names = [hub.name, "poet", "chef"]
    expect(talk.answers).to_have_count(3)
    first = [talk.answer(at) for at in range(3)]
    assert first == [api(url, name, "a") for name in names]
    assert [talk.name(at) for at in range(3)] == names
    tops = {round(talk.answers.nth(at).bounding_box()["y"]) for at in range(3)}
    assert len(tops) == 1
    talk.ask("b")
    expect(talk.answers).to_have_count(6)
    wanted = [api(url, name, "a", said, "b") for name, said in zip(names, first, strict=True)]
    assert [talk.answer(at) for at in range(3, 6)] == wanted
    more.click()
    expect(more).to_be_disabled()
    for left in (3, 2, 1):
        talk.page.get_by_role("button", name="Ask this one no more").first.click()
        expect(talk.page.get_by_role("combobox", name="Who answers")).to_have_count(left)
    expect(talk.page.get_by_role("button", name="Ask this one no more")).to_have_count(0)


def test_a_new_persona_appears_and_the_choice_stays(talk, server, put_up):
    talk.page.clock.install()
    talk.open()
    talk.choose("chef")
    put_up[0]("late", 5)
    until(lambda: "late" in models(server[0]))
    with talk.page.expect_response("**/v1/models"):
        talk.page.clock.fast_forward(16_000)
    expect(talk.who()).to_have_value("chef")
    talk.who().press("ArrowDown")
    expect(talk.page.get_by_role("option").filter(has_text="late")).to_be_visible()
    talk.who().press("Escape")
    (put_up[1] / "late.safetensors").unlink()
    until(lambda: "late" not in models(server[0]))


def test_two_thousand_personas_are_found_by_a_part_of_their_name(talk):
    def many(route):
        told = route.fetch().json()
        chef = next(card for card in told["data"] if card["id"] == "chef")
        told["data"] = [told["data"][0], *({**chef, "id": f"persona-{i:04}"} for i in range(2000))]
        route.fulfill(json=told)

    talk.page.route("**/v1/models", many)
    talk.open()
    talk.who().click()
    expect(talk.page.get_by_role("option")).to_have_count(50)
    expect(talk.page.get_by_text("1,951 more: type a part of the name")).to_be_visible()
    talk.who().press_sequentially("A-123")
    expect(talk.page.get_by_role("option")).to_have_count(10)
    for key in ("ArrowDown", "ArrowDown", "Enter"):
        talk.who().press(key)
    expect(talk.who()).to_have_value("persona-1232")
    talk.who().fill("persona-1232:0.5+77")
    expect(talk.page.get_by_role("option").first).to_contain_text("persona-0077")
    talk.who().press("Enter")
    expect(talk.who()).to_have_value("persona-1232:0.5+persona-0077")
    expect(talk.page.get_by_text("a blend of persona-1232 and persona-0077")).to_be_visible()
    talk.page.unroute_all(behavior="wait")


def test_keys_are_enough_and_shift_enter_begins_a_line(talk):
    keys = talk.page.keyboard
    expect(talk.question).to_be_focused()
    keys.type("a")
    keys.press("Shift+Enter")
    keys.type("b")
    expect(talk.question).to_have_value("a\nb")
    keys.press("Enter")
    talk.answer()
    expect(talk.question).to_be_focused()
    keys.press("Enter")
    expect(talk.answers).to_have_count(1)


def test_a_phone_shows_it_without_scrolling_aside(chromium, server):
    for talk in opened(chromium, server[0], viewport={"width": 360, "height": 640}, is_mobile=True):
        talk.open().settings()
        talk.page.get_by_role("button", name="Compare").click()
        talk.choose("poet", 1)
        talk.ask("w" * 400)
        talk.answer(0)
        assert talk.answers.nth(0).bounding_box()["y"] < talk.answers.nth(1).bounding_box()["y"]
        assert talk.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_key_is_asked_for_when_the_server_wants_one_and_is_of_this_tab_only(chromium, base, put_up, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAW_CACHE", str(tmp_path))
        with running(base, [put_up[1]], Serving(port=0, key=KEY)) as (url, hub):
            for talk in opened(chromium, url):
                talk.page.goto(url)
                field = talk.page.get_by_label("This server asks for its key")
                expect(field).to_be_focused()
                field.fill("sesam")
                field.press("Enter")
                expect(talk.page.get_by_text("The one that was given is not taken.")).to_be_visible()
                field.fill(KEY)
                talk.page.get_by_role("button", name="Use it").click()
                expect(talk.who()).to_have_value(hub.name)
                expect(field).to_be_hidden()
                talk.settings()
                talk.ask("a")
                assert talk.answer()
                assert talk.page.evaluate("[localStorage.length, document.cookie, location.href]") == [0, "", f"{url}/"]
                assert talk.page.evaluate("sessionStorage.getItem('key')") == KEY
                assert all("status of 401" in fault for fault in talk.faults), talk.faults
                talk.faults.clear()


def test_the_key_is_not_asked_for_where_none_is_wanted(talk):
    expect(talk.page.get_by_label("This server asks for its key")).to_be_hidden()


def test_a_browser_runs_only_what_the_page_has(talk, server):
    """Its policy forbids what an answer might smuggle in, were it ever read as HTML."""
    with urllib.request.urlopen(server[0], timeout=PATIENCE) as reply:
        policy = dict(rule.strip().split(" ", 1) for rule in reply.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[\w+/=]{44}'", policy["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/=]{44}'", policy["style-src"])
    talk.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(1)>')")
    until(lambda: talk.page.evaluate("document.querySelector('img').complete") and talk.faults)
    assert all("Content Security Policy" in fault for fault in talk.faults), talk.faults
    talk.faults.clear()
