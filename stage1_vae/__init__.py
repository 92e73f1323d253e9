"""Stage 1: images to latents and back. Knows no prior network, disk, device or command line.

Without `pipelines`, in a loop of your own. A VQ-VAE:

    import torch

    from stage1_vae.autoencoder import AutoencoderConfig
    from stage1_vae.bottlenecks import VectorQuantized
    from stage1_vae.networks import Convolutional

    images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
    vae = AutoencoderConfig(Convolutional(width=32), VectorQuantized(codes=64, channels=16)).build((1, 28, 28))
    optimizer, steps = torch.optim.Adam(vae.parameters(), lr=1e-3), 30
    for step in range(steps):
        batch = images[torch.randint(len(images), (16,))]
        loss = vae(batch, progress=step / steps)["loss"]  # nats per image
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    vae.eval()
    with torch.no_grad():
        posteriors = vae.encode(images)  # one for each level; here [{"codes": 64 7 7}]
        again = vae.render(vae.mean(posteriors))  # uint8, 64 1 28 28

- `progress`, the share of the training that is done, drives all schedules. Left out, they stay at their beginning: then a dVAE
  has no rate in its loss, and a codebook still replaces codes at the end.
- In training mode, `encode` would normalize by the batch, and change the running means of a VQ-VAE.
- Values of a config outside of the range in its annotation are refused by the command line, but not here.
- Weights are float32; mixed precision is that of `torch.autocast`. Models can be compiled, copied, pickled, saved as state_dict.
- Other bottlenecks, networks and likelihoods are other configs, with the same loop: see bottlenecks.py, hierarchy.py (VQ-VAE-2),
  networks.py, likelihoods.py. bounds.py has the bounds on log p(x), under any prior.
"""
