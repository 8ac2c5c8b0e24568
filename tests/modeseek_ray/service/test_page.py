"""The page's files: served as they are, complete, from here alone, and free of syntax errors.

What they do is seen in `browser/`, in a real one.
"""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from playwright._impl._driver import compute_driver_executable

from modeseek_ray.service.page import assets

ROOT = Path(__file__).parents[3]
WEB = ROOT / "modeseek_ray" / "service" / "web"
OURS = sorted(path for path in WEB.rglob("*") if path.is_file() and "vendor" not in path.parts)
SCRIPTS = [path for path in OURS if path.suffix == ".js"]
NODE = compute_driver_executable()[0]  # a Node comes with Playwright: always there, always the same


def run_node(script: str) -> subprocess.CompletedProcess[str]:
    """Run a module that may import the page's own."""
    command = [NODE, "--input-type=module", "--eval", script]
    return subprocess.run(command, cwd=WEB / "js", capture_output=True, text=True, timeout=120)


def test_the_page_and_every_file_of_it_are_served(service: Any) -> None:
    on_disk = {path.relative_to(WEB).as_posix(): path for path in WEB.rglob("*") if path.is_file()}
    assert set(assets()) == set(on_disk)
    with service.http() as http:
        for name, path in on_disk.items():
            answer = http.get("/" if name == "index.html" else f"/web/{name}")
            assert answer.status_code == 200, name
            assert answer.content == path.read_bytes()
            again = http.get(f"/web/{name}", headers={"If-None-Match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        assert http.get("/").headers["content-type"] == "text/html; charset=utf-8"
        assert http.get("/docs").content == on_disk["docs.html"].read_bytes()
        assert http.get("/web/js/main.js").headers["content-type"] == "text/javascript; charset=utf-8"


def test_nothing_else_is_served(service: Any) -> None:
    with service.http() as http:
        for path in ("none.js", "..%2Fpage.py", "%2e%2e/page.py", "js/../../page.py", "vendor"):
            answer = http.get(f"/web/{path}")
            assert answer.status_code == 404, path
            assert answer.json()["error"]["code"] == "unknown_url"


def test_the_policy_lets_nothing_in_from_elsewhere_and_nothing_inline(service: Any) -> None:
    with service.http() as http:
        policy = http.get("/").headers["content-security-policy"]
        assert http.get("/docs").headers["content-security-policy"] == policy
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("default-src") == "'none'"
    assert {value for name, value in rules.items() if name.endswith("-src")} == {"'self'"}
    assert rules["frame-ancestors"] == rules["base-uri"] == "'none'"
    assert "unsafe" not in policy and "http" not in policy


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_what_a_file_refers_to_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    imports = re.findall(r'^(?:import|export) [^;]*? from "([^"]+)"', text, flags=re.MULTILINE)
    assert all((path.parent / name).is_file() for name in imports), imports
    linked = re.findall(r'(?:src|href)="(/web/[^"]+)"', text)
    assert all((WEB / name.removeprefix("/web/")).is_file() for name in linked), linked
    for match in re.findall(r"https?://[^\s\"'`)]+", text):
        assert match == "http://www.w3.org/2000/svg", f"{path.name} refers to {match}"
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
    )
    if path.suffix == ".html":
        assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son[a-z]+=", text)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_can_be_parsed(path: Path) -> None:
    command = [NODE, "--input-type=module", "--check"]
    done = subprocess.run(command, input=path.read_text(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_script_is_reached_from_a_page() -> None:
    reached: set[Path] = set()
    pages = "".join(path.read_text() for path in WEB.glob("*.html"))
    todo = [WEB / name for name in re.findall(r'<script [^>]*src="/web/([^"]+)"', pages)]
    while todo:
        path = todo.pop()
        if path not in reached:
            reached.add(path)
            todo += [
                (path.parent / name).resolve() for name in re.findall(r' from "([^"]+)"', path.read_text())
            ]
    assert {path for path in reached if "vendor" not in path.parts} == set(SCRIPTS)


def test_the_files_are_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for path in WEB.rglob("*"):
        name = path.relative_to(ROOT / "modeseek_ray").as_posix()
        if path.is_file():
            assert any(fnmatch(f"/{name}", f"/{pattern}") for pattern in patterns["modeseek_ray"]), name


def test_the_charting_library_comes_with_its_licence() -> None:
    assert "MIT License" in (WEB / "vendor" / "uPlot.LICENSE.txt").read_text()
    assert "uPlot.js" in (WEB / "vendor" / "uPlot.js").read_text()[:300]


def test_a_table_forgets_what_a_resumed_attempt_does_again() -> None:
    done = run_node("""
        import assert from "node:assert";
        import { MetricTable } from "./table.js";
        const table = new MetricTable();
        for (let step = 1; step <= 1000; step += 1) table.add(step, { loss: step, bound_by: "cap" });
        table.add(1000, { "validation.nll": 7 });
        assert.deepEqual([table.length, table.last("loss"), table.last("validation.nll")], [1000, 1000, 7]);
        table.add(601, { loss: -1 }, true);
        assert.deepEqual([table.length, table.steps.at(-1), table.last("loss")], [601, 601, -1]);
        assert.ok(Number.isNaN(table.last("validation.nll")));
        table.add(602, { accuracy: 0.5 });
        assert.ok(Number.isNaN(table.column("loss").at(-1)));
        assert.equal(table.text("bound_by")[602 - 1], undefined);
    """)
    assert done.returncode == 0, done.stderr


def test_thinning_keeps_every_spike() -> None:
    done = run_node("""
        import assert from "node:assert";
        import { align, thin } from "./thin.js";
        const x = Float64Array.from({ length: 100_000 }, (_, i) => i);
        const y = new Float64Array(100_000).fill(1);
        y[77_777] = 50; y[12] = -3; y[500] = NaN;
        const thinned = thin(x, y, 400);
        assert.equal(thinned.x.at(-1), 99_999);
        assert.ok(thinned.x.length <= 801 && thinned.x.length >= 400);
        assert.ok(thinned.y.includes(50) && thinned.y.includes(-3) && !thinned.y.some(Number.isNaN));
        assert.equal(thinned.x[thinned.y.indexOf(50)], 77_777);
        assert.deepEqual(thinned.x, [...thinned.x].sort((a, b) => a - b));
        assert.deepEqual(thin(x, y, 400, 100, 103).x, [99, 100, 101, 102, 103]);
        const aligned = align([{ x: [1, 3], y: [5, 6] }, { x: [2, 3], y: [7, 8] }]);
        assert.deepEqual(aligned, [[1, 2, 3], [5, undefined, 6], [undefined, 7, 8]]);
    """)
    assert done.returncode == 0, done.stderr


def test_a_stream_may_be_cut_anywhere() -> None:
    done = run_node(r"""
        import assert from "node:assert";
        import { parser } from "./stream.js";
        const text = ': hello\nretry: 1000\n\ndata: {"id":"a","m":"x: y"}\nid: a\n\n'
          + 'data: {"id":"b"}\nid: b\n\ndata: [DONE]\n\n';
        for (let cut = 0; cut <= text.length; cut += 1) {
          const parse = parser();
          const parts = [parse(text.slice(0, cut)), parse(text.slice(cut))];
          assert.deepEqual(parts.flatMap((part) => part.events.map((event) => event.id)), ["a", "b"]);
          assert.ok(parts.some((part) => part.done));
        }
    """)
    assert done.returncode == 0, done.stderr


def test_an_answer_is_read_as_it_is_written_and_an_error_in_it_is_thrown() -> None:
    done = run_node(r"""
        import assert from "node:assert";
        import { pieces } from "./ask.js";
        const piece = (content) => `data: ${JSON.stringify({ choices: [{ delta: { content } }] })}\n\n`;
        const all = piece("") + piece("zwei") + piece(" Wörter") + 'data: {"choices":[]}\n\ndata: [DONE]\n\n';
        const bytes = new TextEncoder().encode(all);
        for (let cut = 0; cut <= bytes.length; cut += 7) {
          const body = new Blob([bytes.slice(0, cut), bytes.slice(cut)]).stream();
          const read = [];
          for await (const text of pieces({ body })) read.push(text);
          assert.equal(read.join(""), "zwei Wörter");
        }
        const broken = new Response(piece("a") + 'data: {"error":{"code":"engine_lost","message":"m"}}\n\n');
        await assert.rejects(async () => { for await (const _ of pieces(broken)); }, { code: "engine_lost" });
    """)
    assert done.returncode == 0, done.stderr


def test_the_front_is_that_of_the_reports() -> None:
    """The worked example of `modeseek_ray.retention.pareto_front`."""
    done = run_node("""
        import assert from "node:assert";
        globalThis.matchMedia = () => ({});
        const { paretoFront } = await import("./scatter.js");
        const points = [{ x: 0.9, y: 0.2 }, { x: 0.5, y: 0.8 }, { x: 0.4, y: 0.7 }];
        assert.deepEqual(paretoFront(points), [true, true, false]);
        assert.deepEqual(paretoFront([{ x: 1, y: 1 }, { x: 1, y: 1 }]), [true, true]);
        // What the table shows as equal is equal: 98.5 % and 98.46 %.
        assert.deepEqual(paretoFront([{ x: 0.985, y: 0.5 }, { x: 0.9846, y: 0.8 }]), [false, true]);
    """)
    assert done.returncode == 0, done.stderr


def test_axes_do_not_blow_up_a_level_line_and_the_last_value_holds() -> None:
    done = run_node("""
        import assert from "node:assert/strict";
        const { newest, rangeOf } = await import("./scale.js");
        assert.deepEqual(rangeOf(0, 0), [0, 1]); // not 0 to 100, as if there were something to see
        assert.deepEqual(rangeOf(0.5, 0.5), [0, 0.53]);
        assert.deepEqual(rangeOf(-1, -1), [-1.06, 0]);
        assert.deepEqual(rangeOf(0.5, 2), [0, 2.12]); // zero is near: it is shown
        assert.deepEqual(rangeOf(10, 11), [9.94, 11.06]); // and far: it is not
        assert.deepEqual(rangeOf(null, null), [0, 1]);
        assert.equal(newest([1, undefined, 3, undefined], 3), 3);
        assert.equal(newest([undefined, 2], 0), null);
    """)
    assert done.returncode == 0, done.stderr


def test_the_documentation_shows_every_operation(service: Any, tmp_path: Path) -> None:
    """The page's own script, run on the service's own document; of a browser there is only what it touches."""
    with service.http() as http:
        document = http.get("/openapi.json").json()
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    done = run_node(f"""
        import {{ readFileSync }} from "node:fs";
        class Element {{
          constructor(tag) {{ this.tagName = tag; this.children = []; this.attributes = {{}}; }}
          setAttribute(name, value) {{ this.attributes[name] = value; }}
          append(...more) {{ this.children.push(...more); }}
          replaceChildren(...all) {{ this.children = all; }}
          text() {{ return this.children.map((c) => c instanceof Element ? c.text() : c).join("\\n"); }}
        }}
        const main = new Element("main");
        globalThis.document = {{
          getElementById: (id) => id === "main" ? main : null,
          createElement: (tag) => new Element(tag),
        }};
        globalThis.window = {{ addEventListener() {{}} }};
        globalThis.location = {{ hash: "" }};
        globalThis.fetch = async (url) => ({{
          ok: url === "/openapi.json", json: async () => JSON.parse(readFileSync("{tmp_path}/openapi.json")),
        }});
        await import("./docs.js");
        console.log(main.text());
    """)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    for path, item in document["paths"].items():
        for method in item:
            assert f"{method.upper()} {path}" in shown
    assert {"training_file", "idempotency-key", "Request body, multipart/form-data"} <= set(shown)
    assert "string, at most 64, characters" not in shown
    assert "undefined" not in done.stdout and "[object" not in done.stdout


def test_the_form_has_a_control_for_every_field_of_a_job(service: Any) -> None:
    """Only lists and maps, and what is free-form by nature, are written as JSON."""
    with service.http() as http:
        route = http.get("/openapi.json").json()["paths"]["/v1/fine_tuning/jobs"]["post"]
    schema = route["requestBody"]["content"]["application/json"]["schema"]
    done = run_node(f"""
        import {{ resolve, shape }} from "./schema.js";
        const root = {json.dumps(schema)};
        const found = [];
        const walk = (at, path) => {{
          found.push([path, at.kind, at.schema.type ?? null]);
          for (const field of at.fields ?? []) walk(field.shape, `${{path}}.${{field.name}}`);
          for (const option of at.options ?? []) walk(option.shape, `${{path}}<${{option.label}}>`);
        }};
        walk(shape(root, root), "");
        console.log(JSON.stringify(found));
    """)
    assert done.returncode == 0, done.stderr
    kinds = {path: (kind, type_) for path, kind, type_ in json.loads(done.stdout)}
    assert kinds[".method"][0] == "tagged"
    assert kinds[".method.weighted.likelihood<ratio_power>.gamma<ess>.ess.floor"][0] == "number"
    assert kinds[".method.supervised.training.epochs"][0] == "auto"
    assert kinds[".method.online.grader<string_check>.type"][0] == "const"
    raw = {path: type_ for path, (kind, type_) in kinds.items() if kind in ("json", "map")}
    assert ".metadata" in raw
    assert [path for path, type_ in raw.items() if type_ not in ("array", "object")] == []
