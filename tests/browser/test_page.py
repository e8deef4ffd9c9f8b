"""The views on ComfyUI's page, as a user meets them. Each test leaves the page as it found it: with a run on it."""

import re

PREVIEW, REPORT, PATCH = "ToPiMaskPreview", "ToPiReport", "ToPiPatch"
TOKEN = 16  # pixels of the demo's images


def counts(page) -> tuple[str, int, int]:
    """Step, kept and all tokens, as the preview says beside its picture."""
    step, kept, tokens = re.search(r"step (\d+) · \u03c3 [\d.]+ · kept (\d+) of (\d+)", page.text(PREVIEW)).groups()
    return int(step), int(kept), int(tokens)


def source(page) -> str:
    return page.run(f"topiTest.images('{PREVIEW}')[0].src")


def test_the_overlay_shows_what_was_kept_and_the_slider_its_anchors(page):
    page.drag_slider(PREVIEW, 0)
    seen = {}
    for share in (1, 0):
        page.drag_slider(PREVIEW, share)
        page.wait(f"topiTest.ready('{PREVIEW}')")
        step, kept, tokens = counts(page)
        assert page.dark_tokens(PREVIEW, TOKEN) == tokens - kept
        assert 0 < kept < tokens == 64
        seen[step] = source(page)
    assert set(seen) == {0, 2}
    assert len(set(seen.values())) == 2


def test_the_picture_is_on_the_screen_inside_its_node(page):
    page.look_at(PREVIEW)
    image = page.element(PREVIEW, "img").bounding_box()
    assert min(image["width"], image["height"]) > 100
    top = page.run(
        "([x, y]) => document.elementFromPoint(x, y)?.closest('.topi') === topiTest.root('ToPiMaskPreview')",
        [image["x"] + image["width"] / 2, image["y"] + image["height"] / 2],
    )
    assert top


def test_play_and_pause(page):
    page.drag_slider(PREVIEW, 0)
    first = source(page)
    page.element(PREVIEW, "button").click()
    page.wait(f"topiTest.images('{PREVIEW}')[0].src !== '{first}'")
    page.wait(f"topiTest.images('{PREVIEW}')[0].src === '{first}'")  # around
    page.element(PREVIEW, "button").click()
    page.page.wait_for_timeout(1500)
    paused = source(page)
    page.page.wait_for_timeout(1500)
    assert source(page) == paused


def test_the_report_is_on_its_node(page):
    text = page.text(REPORT)
    assert "2 anchors, 2 pruned" in text
    assert "predicted" in text


def test_the_patch_node_shows_the_newest_anchor_live(page):
    assert [anchor["step"] for anchor in page.run("topiTest.anchors")][-2:] == [0, 2]
    assert re.search(r"step 2 · \u03c3 [\d.]+ · kept [\d.]+% of 64", page.text(PATCH))
    assert page.run(f"topiTest.ready('{PATCH}')")


def test_settings_reach_the_run_and_are_gone_with_their_node(page):
    before = counts(page)[1]
    page.run(
        """() => {
          const settings = LiteGraph.createNode("ToPiSettings");
          app.rootGraph.add(settings);
          settings.connect(0, topiTest.node("ToPiPatch"), "settings");
        }"""
    )
    page.set("ToPiSettings", "max_keep", 0.25)
    page.queue()
    assert counts(page)[1:] == (16, 64)
    page.run("app.rootGraph.remove(topiTest.node('ToPiSettings'))")
    page.queue()
    assert counts(page)[1] == before > 16


def test_a_setting_turns_the_live_view_off(page):
    page.run("app.extensionManager.setting.set('topi.live', false)")
    try:
        before = page.run("topiTest.anchors.length")
        page.set("KSampler", "seed", 11)
        page.queue()
        assert page.run("topiTest.anchors.length") == before
    finally:
        page.run("app.extensionManager.setting.set('topi.live', true)")


def test_it_survives_another_tab(page):
    before = counts(page), source(page).partition("&rand")[0]
    page.new_tab()
    page.to_tab("topi_quickstart_demo")
    page.wait(f"topiTest.ready('{PREVIEW}')")
    assert (counts(page), source(page).partition("&rand")[0]) == before
    assert "2 anchors, 2 pruned" in page.text(REPORT)


def test_it_comes_back_when_the_run_ended_behind_another_tab(page):
    page.set("KSampler", "seed", 12)
    before = source(page)
    done = page.run("topiTest.done")
    page.run("app.queuePrompt(0).then(() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow'))")
    page.wait(f"!topiTest.node('ToPiMaskPreview') && topiTest.done > {done}")
    page.to_tab("topi_quickstart_demo")
    page.wait(f"topiTest.ready('{PREVIEW}') && topiTest.images('{PREVIEW}')[0].src !== '{before}'")


def test_it_survives_a_reload(page):
    before = source(page)
    page.reload()
    page.wait(f"topiTest.ready('{PREVIEW}')")
    assert source(page) == before
    assert "2 anchors, 2 pruned" in page.text(REPORT)


def test_a_rerun_from_the_cache_shows_the_same_run(page):
    before = counts(page), source(page)
    page.queue()
    assert (counts(page), source(page)) == before


def test_another_run_shows_other_pictures(page):
    before = source(page)
    page.set("KSampler", "seed", 13)
    page.queue()
    assert source(page) != before


def test_missing_files_leave_a_sentence_and_no_error(page, temp_folder):
    for file in temp_folder.glob("*.png"):
        file.unlink()
    page.reload()
    page.wait(f"topiTest.root('{PREVIEW}')?.innerText.includes('is gone from')")
    page.set("KSampler", "seed", 14)
    page.queue()
    assert page.run(f"topiTest.ready('{PREVIEW}')")


def test_nothing_is_left_behind_with_a_removed_node(page):
    """A node that plays stops when it is removed; nothing of ours is saved with the workflow."""
    saved = page.run("topiTest.node('ToPiMaskPreview').serialize().widgets_values")
    assert saved == [0, 1.0]
    page.look_at(PREVIEW)
    page.element(PREVIEW, "button").click()
    slider = page.element(PREVIEW, "input")
    page.new_tab()
    value = slider.evaluate("(slider) => slider.value")
    page.page.wait_for_timeout(1600)
    assert slider.evaluate("(slider) => slider.value") == value
    page.to_tab("topi_quickstart_demo")
    page.wait(f"topiTest.ready('{PREVIEW}')")


def test_the_help_of_a_node_has_its_picture(page):
    page.page.keyboard.press("Escape")
    page.look_at(PREVIEW)
    page.run("app.canvas.selectNode(topiTest.node('ToPiMaskPreview'))")
    page.page.get_by_test_id("info-button").click()
    shown = "i.src.endsWith('/docs/ToPiMaskPreview.jpg') && i.naturalWidth"
    page.wait(f"[...document.querySelectorAll('img')].some((i) => {shown})")


def test_no_script_failed(page):
    assert page.errors == []
