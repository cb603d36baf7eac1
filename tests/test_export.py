from __future__ import annotations
import time
from pathlib import Path
from conftest import MakeCheckpoint
from melt_export.export import ExportOptions, building

def test_t(make_checkpoint, tmp_path):
    for n, (d, f) in enumerate([("portable", {}), ("portable", {"num_hidden_layers": 1}), ("onnxruntime", {"num_hidden_layers": 1}), ("onnxruntime", {})]):
        c = make_checkpoint(**f)
        t = time.perf_counter(); p = time.process_time()
        seen = {}
        def step(name, total, done):
            seen.setdefault(name, round(time.perf_counter() - t, 2))
        with building(c, tmp_path / str(n), ExportOptions(dialect=d), progress=step):
            pass
        print(d, f, time.perf_counter() - t, time.process_time() - p, seen)
