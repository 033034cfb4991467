"""How the report's page looks, in light and dark; `--c0` to `--c7` are the colours of the plots' series."""

STYLE = """
:root {
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  --page: #f7f7f5; --sheet: #ffffff; --ink: #16181d; --muted: #666b75; --line: #e3e4e1;
  --good: #157a4a; --bad: #c0322f; --warn-page: #fdf3d8; --warn-ink: #6b4c00;
  --c0: #2a78d6; --c1: #d95926; --c2: #168f64; --c3: #b57f00;
  --c4: #cf4f86; --c5: #4a3aa7; --c6: #5a8a00; --c7: #c93a3a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121316; --sheet: #1b1d21; --ink: #eceded; --muted: #9da2ab; --line: #32353b;
    --good: #4fc48a; --bad: #f0807c; --warn-page: #3a2f10; --warn-ink: #f1d48b;
    --c0: #5b9bea; --c1: #ee7c4b; --c2: #35b886; --c3: #d9a326;
    --c4: #e57fab; --c5: #9d92ef; --c6: #92bf3d; --c7: #ec7472;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--font); }
main { max-width: 1180px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { margin: 0; font-size: 34px; line-height: 1.2; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { margin: 0 0 14px; font-size: 20px; letter-spacing: -0.01em; }
h3 { margin: 20px 0 8px; font-size: 15px; }
h4 { margin: 0 0 4px; font-size: 12px; font-weight: 600; color: var(--muted); }
p { margin: 0 0 12px; max-width: 72ch; }
code, pre { font-family: var(--mono); font-size: 13px; }
small { color: var(--muted); font-weight: 400; }
.eyebrow { margin: 0 0 6px; color: var(--muted); font-size: 14px; }
.about { margin: 8px 0 0; max-width: none; color: var(--muted); font-size: 14px; }
.banner { max-width: none; margin: 24px 0 0; padding: 12px 16px; border-radius: 10px; }
.banner { background: var(--warn-page); color: var(--warn-ink); }
section .banner { margin: 0; }
.note { margin: 10px 0 0; font-size: 13px; color: var(--muted); max-width: none; }
.cards { display: grid; grid-template-columns: repeat(6, 1fr); gap: 14px; margin: 28px 0 0; }
.card, section { background: var(--sheet); border: 1px solid var(--line); border-radius: 14px; }
.card { padding: 16px 18px; }
.card.wide { grid-column: span 2; }
.card h3 { margin: 0; font-size: 13px; font-weight: 500; color: var(--muted); }
.card p { margin: 0; font-size: 12.5px; line-height: 1.4; color: var(--muted); }
.card .value { margin: 4px 0 3px; font-size: 24px; font-weight: 650; line-height: 1.25; color: var(--ink); }
.card .value { letter-spacing: -0.02em; white-space: nowrap; font-variant-numeric: tabular-nums; }
.card.wide .value { font-size: 28px; line-height: 1.07; }
.arrow { color: var(--muted); font-weight: 400; }
section { margin: 18px 0 0; padding: 24px 26px; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 20px; margin: 0 0 12px; padding: 0; list-style: none; }
.legend { font-size: 14px; }
.legend i { display: inline-block; width: 20px; margin-right: 8px; vertical-align: middle; border-top: 3px solid; }
.legend i.dashed { border-top-style: dashed; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 28px; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-top: 6px; font-size: 13px; color: var(--muted); }
.scroll { overflow-x: auto; }
p + .scroll, dl + h3 { margin-top: 20px; }
table { width: 100%; border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { padding: 0 9px 7px; text-align: left; vertical-align: bottom; font-size: 12px; font-weight: 500; }
th { color: var(--muted); line-height: 1.3; }
td { padding: 7px 9px; border-top: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
td:first-child { overflow-wrap: anywhere; min-width: 6em; }
.n { text-align: right; }
td.n { white-space: nowrap; }
tfoot td { font-weight: 600; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.sample + .sample { margin-top: 26px; padding-top: 4px; border-top: 1px solid var(--line); }
.sample > div { margin: 0 0 12px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 14px; }
pre { margin: 0; padding: 10px 12px; border-radius: 8px; background: var(--page); line-height: 1.5; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 22px; margin: 0 0 8px; font-size: 14px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: 18px 0 10px; font-size: 15px; font-weight: 600; }
@media (max-width: 760px) {
  main { padding: 28px 14px 48px; }
  h1 { font-size: 27px; }
  section { padding: 18px 16px; }
  .cards { grid-template-columns: repeat(2, 1fr); gap: 10px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; }
}
@media print { body { background: none; } section { break-inside: avoid; } }
"""
