"""The heavy half: everything that needs torch. It is started as a process, never imported by the light half."""
