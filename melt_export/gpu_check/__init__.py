"""``python -m melt_export.gpu_check``: does everything that should run on this machine's NVIDIA GPU run, and rightly?

machine.py is what is under the backends, subjects.py the models, targets.py what runs them, checks.py what must hold,
timing.py what is measured, report.py what a person and a file see; run.py goes through it all.
"""
