"""Put the winners of both tuning runs into the constants of the kernels."""
import json, os, re
from collections import defaultdict
from pathlib import Path
OUT = Path(os.environ["OUT"])
def rows(name):
    p = OUT / name
    return [json.loads(l) for l in p.read_text().splitlines()] if p.exists() else []
def best(of):
    """Candidate with the smallest product of ratios to the fastest of each shape, of those timed on most shapes."""
    shapes = defaultdict(dict)
    for shape, cand, us in of: shapes[shape][cand] = us
    n = len(shapes); score = {}
    for cand in {c for s in shapes.values() for c in s}:
        times = [s[cand] for s in shapes.values() if cand in s]
        if len(times) == n: score[cand] = sum(times)
    for c, v in sorted(score.items(), key=lambda x: x[1])[:6]: print("   ", c, round(v, 1))
    return min(score, key=score.get) if score else None
def sub(path, pattern, text):
    p = Path(path); t = p.read_text(); n, k = re.subn(pattern, text, t, count=1, flags=re.M); print(path, text, k); p.write_text(n)
a = [r for r in rows("tune_a.jsonl") if "us" in r and r["error"] < 0.05]
def of(form, keep=lambda c: True): return [(str(r["shape"]), tuple(r["candidate"]), r["us"]) for r in a if r["form"] == form and isinstance(r["candidate"], list) and r["shape"][0] == 32 and keep(r["candidate"])]
print("GELU"); w = best(of("convolution + GELU"))
if w: sub("model/kernels/depthwise.py", r"^GELU = .*$", f"GELU = Launch(elements={w[0]}, channels={w[1]}, rows={w[2]}, block={w[3]})")
print("NORM"); w = best(of("sum + convolution + norm"))
if w: sub("model/kernels/depthwise.py", r"^NORM = .*$", f"NORM = Launch(elements={w[0]}, channels={w[1]}, rows={w[2]})")
print("LOCAL"); w = best(of("windows") + of("neighbourhoods"))
if w: sub("model/kernels/local_attention.py", r"^LAUNCH = .*$", f"LAUNCH = Launch(queries={w[0]}, keys={w[1]}, warps={w[2]}, stages={w[3]})")
b = [r for r in rows("tune_b.jsonl") if "us" in r]
att = []
for r in b:
    m = re.match(r"(?:free|fits) t(\d) (\d+)x(\d+)w(\d)( side 1)?$", r["candidate"])
    if r["kernel"] == "deformable_attention" and m and "batch 32" in r["shape"] and r["error"] < 0.1:
        if "dat_pp" in r["shape"] and not r["candidate"].startswith("fits"): continue
        att.append((r["shape"], (int(m[1]), int(m[2]), int(m[3]), int(m[4]), 1 if m[5] else 0), r["us"]))
print("ATTENTION"); w = best(att)
if w:
    for name, value in zip(("QUERIES", "KEYS", "WARPS", "SIDE"), w[1:]): sub("model/kernels/packed_attention.py", rf"^{name} = .*$", f"{name} = {value}")
    sub("model/kernels/packed_attention.py", r"together: int = \d", f"together: int = {w[0]}")
