"""Reports: tables, plots and notebooks from run folders and results/.

May import: planner, config, core and `run.folder`; no torch.
"""
