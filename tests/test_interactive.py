"""What answers on the pages, in a browser: quizzes, the interactive figures and the demo, against bitlib's numbers."""

import contextlib
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from book import chapter_paths
from companion import read_companion
from playwright.sync_api import Browser, TimeoutError
from screenshots import ROOT, SITE, Visit, browser_path, settle
from stills import read_reliability, wave
from vendor import RUNTIME_LIMIT, available, folder

from bitlib.evaluate import expected_calibration_error, negative_log_likelihood, reliability_curve, topk_accuracy
from bitlib.hyperrule import hyperrule
from bitlib.norm import group_norm

DEMO = ROOT / "pages" / "_static" / "demo"
pytestmark = [
    pytest.mark.skipif(not (SITE / "pages" / "explore.html").exists(), reason="the site is not built: make book"),
    pytest.mark.skipif(browser_path() is None, reason="no Chromium here: on Debian, apt install chromium"),
]
has_runtime = pytest.mark.skipif(
    not (SITE / "_static" / "vendor" / folder("onnxruntime-web").name).exists(),
    reason="the demo's runtime was not fetched when the site was built (no npm, or no network)",
)
CHAPTER = chapter_paths()[1]


class TestQuiz:
    page = f"chapters/{CHAPTER.stem}.html"

    def test_right_and_wrong_answers_are_explained(self, browser: Browser, site: str):
        questions = read_companion(CHAPTER).quiz
        with Visit(browser, site, self.page) as visit:
            forms = visit.page.locator("form.quiz")
            assert forms.count() == len(questions)
            for number, question in enumerate(questions):
                form = forms.nth(number)
                assert not form.locator("details").is_visible()
                form.locator("button").click()
                assert "Choose an answer" in form.locator(".quiz-reply").inner_text()
                for choice in question.choices:
                    form.get_by_label(choice.text, exact=True).check()
                    assert form.locator(".quiz-reply").inner_text() == ""
                    form.locator("button").click()
                    reply = form.locator(".quiz-reply").inner_text()
                    assert reply.startswith("Right." if choice.right else "Not so."), (choice.text, reply)
                    assert choice.why.split("$")[0][:40] in reply
            assert not visit.problems, "\n".join(visit.problems)

    def test_works_by_keyboard_alone(self, browser: Browser, site: str):
        with Visit(browser, site, self.page) as visit:
            form = visit.page.locator("form.quiz").first
            form.locator("input").first.focus()
            visit.page.keyboard.press("ArrowDown")
            assert form.locator("input").nth(1).is_checked()
            visit.page.keyboard.press("Tab")
            assert visit.page.evaluate("document.activeElement.textContent") == "Check"
            visit.page.keyboard.press("Enter")
            assert form.locator(".quiz-reply").inner_text() != ""

    def test_without_javascript_the_answers_unfold(self, browser: Browser, site: str):
        context = browser.new_context(java_script_enabled=False)
        page = context.new_page()
        page.goto(f"{site}/{self.page}")
        form = page.locator("form.quiz").first
        assert not form.locator("button").is_visible()
        form.locator("summary").click()
        right = next(choice for choice in read_companion(CHAPTER).quiz[0].choices if choice.right)
        assert right.text in form.locator("details").inner_text()
        context.close()


class TestExplore:
    page = "pages/explore.html"

    def test_the_rule_is_bitlibs(self, browser: Browser, site: str):
        networks = {"R50x1": None, "R152x4": Named("R152x4", 8192), "mini": Named("R26x0.25", 512)}
        cases = [
            {"n": n, "height": h, "width": w, "variant": variant, "network": network}
            for n in (1, 19_999, 20_000, 499_999, 500_000)
            for h, w in ((32, 32), (95, 97), (96, 96), (480, 640))
            for variant in ("paper", "official", "simplified")
            for network in networks
        ]
        steps = (0, 1, 99, 100, 150, 200, 201, 499)
        with Visit(browser, site, self.page) as visit:
            found = visit.page.evaluate(
                "([cases, steps]) => cases.map(c => { const r = explore.hyperrule(c);"
                " return {...r, scaled: explore.scaled(r, 64).baseLr,"
                " lr: steps.map(s => explore.learningRate(r, s))} })",
                [cases, steps],
            )
        for case, theirs in zip(cases, found, strict=True):
            network = networks[case["network"]]
            rule = hyperrule(case["n"], (case["height"], case["width"]), case["variant"], model=network)
            expected = (
                rule.steps,
                rule.warmup_steps,
                list(rule.decay_steps),
                rule.decay,
                rule.base_lr,
                rule.batch_size,
            )
            assert expected == tuple(
                theirs[key] for key in ("steps", "warmupSteps", "decaySteps", "decay", "baseLr", "batchSize")
            ), case
            assert (rule.resize, rule.crop, rule.mixup_alpha) == (
                theirs["resize"],
                theirs["crop"],
                theirs["mixupAlpha"],
            )
            assert math.isclose(theirs["scaled"], rule.scaled(64).base_lr)
            assert all(math.isclose(a, rule.lr(s), abs_tol=1e-12) for a, s in zip(theirs["lr"], steps, strict=True))

    def test_normalizations_are_bitlibs(self, browser: Browser, site: str):
        x = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with Visit(browser, site, self.page) as visit:
            for values in (x, wave()):
                for groups in (1, 2, 4, 8):
                    found = visit.page.evaluate("([x, g]) => explore.normalise(x, g)", [values.tolist(), groups])
                    torch.testing.assert_close(torch.tensor(found).double(), group_norm(values, groups))
                found = visit.page.evaluate("x => explore.normalise(x, 'batch')", values.tolist())
                expected = F.batch_norm(values, None, None, training=True)
                torch.testing.assert_close(torch.tensor(found).double(), expected)

    def test_reliability_is_bitlibs(self, browser: Browser, site: str):
        logits, labels, _ = read_reliability()
        with Visit(browser, site, self.page) as visit:
            for t in (0.2, 0.5, 1.0, 1.7, 3.0):
                found = visit.page.evaluate(
                    "t => explore.reliability(bitReliability.logits, bitReliability.labels, t)", t
                )
                assert abs(found["ece"] - expected_calibration_error(logits / t, labels)) < 1e-4
                assert abs(found["nll"] - negative_log_likelihood(logits / t, labels)) < 1e-4
                assert abs(found["top1"] - topk_accuracy(logits, labels)) < 1e-9
                curve = reliability_curve(logits / t, labels)
                assert abs(len(found["bins"]) - len(curve.count)) <= 1  # a confidence on an edge may fall either way
                assert sum(b["count"] for b in found["bins"]) == len(labels)

    def test_controls_change_what_is_drawn_by_keyboard(self, browser: Browser, site: str):
        with Visit(browser, site, self.page) as visit:
            page = visit.page
            assert not visit.problems, "\n".join(visit.problems)
            assert "500 steps of 512" in page.locator("[data-explorer=hyperrule] .reading").inner_text()
            page.get_by_label("Training examples").focus()
            page.keyboard.press("End")
            assert "20,000 steps" in page.locator("[data-explorer=hyperrule] .reading").inner_text()
            page.get_by_label("Rule of").select_option("simplified")
            assert "10,000 steps" in page.locator("[data-explorer=hyperrule] .reading").inner_text()
            norms = page.locator("[data-explorer=norms] .reading")
            page.get_by_label("Factor on image 2").focus()
            page.keyboard.press("End")
            assert "by up to 0.00" in norms.inner_text()
            page.get_by_label("Layer").select_option("batch")
            assert "depend on each other" in norms.inner_text()
            before = page.locator("[data-explorer=reliability] path").last.get_attribute("d")
            page.get_by_label("Temperature", exact=True).focus()
            page.keyboard.press("Home")
            assert page.locator("[data-explorer=reliability] path").last.get_attribute("d") != before
            for drawing in page.locator(".explorer svg").all():
                assert len(drawing.get_attribute("aria-label")) > 20
            assert not page.locator("img.still-norms").is_visible()

    def test_works_from_a_file_and_without_javascript(self, browser: Browser):
        address = (SITE / self.page).as_uri()
        page = browser.new_page()
        page.goto(address)
        settle(page)
        assert page.locator(".explorer svg").count() >= 5
        page.close()
        context = browser.new_context(java_script_enabled=False)
        page = context.new_page()
        page.goto(address)
        assert page.locator(".explorer:visible").count() == 0
        for name in ("hyperrule", "norms", "reliability"):
            assert page.locator(f"img.still-{name}").is_visible()
        context.close()


class Named:
    """As much of a network as `hyperrule` looks at."""

    def __init__(self, name: str, num_features: int):
        self.name, self.num_features = name, num_features


# Strokes of a plain handwriting, in hundredths of the sheet: digit -> lines of points.
STROKES = {
    0: [[(50, 15), (33, 22), (27, 50), (33, 78), (50, 86), (67, 78), (73, 50), (67, 22), (50, 15)]],
    1: [[(40, 28), (54, 14), (54, 86)]],
    2: [[(30, 30), (38, 17), (55, 14), (68, 24), (66, 40), (50, 58), (30, 84), (72, 84)]],
    3: [[(30, 20), (50, 14), (68, 22), (66, 38), (48, 47), (68, 56), (70, 74), (52, 86), (30, 80)]],
    4: [[(56, 14), (28, 60), (74, 60)], [(60, 38), (60, 88)]],
    5: [[(68, 16), (36, 16), (33, 46), (52, 42), (68, 52), (69, 70), (56, 85), (32, 82)]],
    6: [[(62, 14), (42, 30), (31, 54), (33, 74), (48, 86), (64, 80), (68, 66), (60, 54), (44, 55), (33, 66)]],
    7: [[(28, 17), (72, 17), (54, 50), (44, 86)]],
    8: [
        [(50, 48), (35, 40), (33, 24), (48, 14), (64, 22), (65, 36), (50, 48)],
        [(50, 48), (34, 58), (30, 74), (48, 86), (68, 76), (66, 60), (50, 48)],
    ],
    9: [[(66, 34), (56, 48), (40, 46), (32, 32), (42, 17), (58, 15), (67, 26), (66, 52), (60, 86)]],
}


class TestDemo:
    page = "pages/demo.html"

    def test_card_is_of_the_files_and_of_the_checkpoint(self):
        card = json.loads((DEMO / "card.json").read_text(encoding="utf-8"))
        assert card["onnx_sha256"] == sha256(DEMO / "digits.onnx"), "run `make demo`"
        checkpoint = ROOT / "data" / "checkpoints" / f"{card['checkpoint']}.safetensors"
        assert card["checkpoint_sha256"] == sha256(checkpoint), "the checkpoint is another: run `make demo`"
        assert card["test_top1_of_the_exported_net"] > 0.95

    @has_runtime
    def test_everything_is_local_and_small(self):
        runtime = SITE / "_static" / "vendor" / folder("onnxruntime-web").name
        files = [DEMO / "digits.onnx", *runtime.iterdir()]
        total = sum(path.stat().st_size for path in files)
        assert total <= RUNTIME_LIMIT, f"{total / 1e6:.1f} MB"
        assert available("onnxruntime-web")

    @has_runtime
    def test_equals_pytorch_on_test_vectors(self, browser: Browser, site: str):
        vectors = json.loads((DEMO / "vectors.json").read_text(encoding="utf-8"))
        with Visit(browser, site, self.page) as visit:
            levels = [value for picture in vectors["levels"] for value in picture]
            found = torch.tensor(visit.page.evaluate("levels => demo.logits(levels)", levels))
            assert not visit.problems, "\n".join(visit.problems)
        expected = torch.tensor(vectors["logits"])
        assert (found - expected).abs().max() < 1e-4
        assert (found.argmax(1) == torch.tensor(vectors["labels"])).float().mean() > 0.9

    @has_runtime
    def test_nothing_is_loaded_before_the_first_stroke(self, browser: Browser, site: str):
        with Visit(browser, site, self.page) as visit:
            asked: list[str] = []
            visit.page.on("request", lambda request: asked.append(request.url))
            visit.page.reload()
            settle(visit.page)
            assert not [url for url in asked if url.endswith((".onnx", ".wasm"))]
            visit.page.get_by_role("button", name="Draw one for me").click()
            visit.page.wait_for_function("document.querySelector('.demo .reading').textContent.includes('I read a')")
            assert any(url.endswith("digits.onnx") for url in asked) and any(url.endswith(".wasm") for url in asked)
            assert not visit.problems, "\n".join(visit.problems)

    @has_runtime
    def test_drawn_digits_are_read(self, browser: Browser, site: str):
        with Visit(browser, site, self.page) as visit:
            page, read = visit.page, {}
            for digit, lines in STROKES.items():
                page.get_by_role("button", name="Clear").click()
                box = page.locator(".demo canvas").bounding_box()
                for line in lines:
                    points = [(box["x"] + x * box["width"] / 100, box["y"] + y * box["height"] / 100) for x, y in line]
                    page.mouse.move(*points[0])
                    page.mouse.down()
                    for point in points[1:]:
                        page.mouse.move(*point, steps=4)
                    page.mouse.up()
                # the last stroke's answer replaces the first one's, sooner or later
                with contextlib.suppress(TimeoutError):
                    page.wait_for_function(
                        "said => document.querySelector('.demo .reading').textContent.includes(said)",
                        arg=f"I read a {digit}",
                        timeout=10_000,
                    )
                read[digit] = page.locator(".demo .reading").inner_text()
            wrong = {digit: said for digit, said in read.items() if f"I read a {digit}" not in said}
            assert not wrong, wrong
            numbers = page.locator(".demo .number").all_inner_texts()
            assert abs(sum(float(text.removesuffix(" %")) for text in numbers) - 100) < 0.6
            assert not visit.problems, "\n".join(visit.problems)

    @has_runtime
    def test_draws_by_keyboard(self, browser: Browser, site: str):
        with Visit(browser, site, self.page) as visit:
            page = visit.page
            page.locator(".demo canvas").focus()
            for key in [" ", *["ArrowDown"] * 14, " "]:
                page.keyboard.press(key)
            page.wait_for_function("document.querySelector('.demo .reading').textContent.includes('I read a')")
            assert "I read a 1" in page.locator(".demo .reading").inner_text()
            page.keyboard.press("Escape")
            assert page.locator(".demo .reading").inner_text() == "Draw a digit."

    def test_without_javascript_a_picture_stays(self, browser: Browser, site: str):
        context = browser.new_context(java_script_enabled=False)
        page = context.new_page()
        page.goto(f"{site}/{self.page}")
        assert page.locator("img.still-demo").is_visible() and not page.locator(".demo").is_visible()
        context.close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
