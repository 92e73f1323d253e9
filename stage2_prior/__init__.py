"""Stage 2: a density over latents. Never sees an image, never imports stage 1.

Without `pipelines`, in a loop of your own. A PixelCNN of codes, conditioned on labels:

    import copy

    import torch

    from stage2_prior.autoregressive import AutoregressiveConfig
    from stage2_prior.conditions import ClassLabel
    from stage2_prior.heads import Categorical
    from stage2_prior.latents import LatentDataset, LatentSpec
    from stage2_prior.pixelcnn import PixelCNNConfig
    from stage2_prior.sampling import Sampling

    posteriors = [{"codes": torch.randint(64, (64, 7, 7))}]  # of 64 images: what `encode` of stage 1 returns
    specs = [LatentSpec((7, 7), vocabulary=64)]  # with an autoencoder, [LatentSpec(*level) for level in vae.latents]
    data = LatentDataset(posteriors, contexts=torch.randint(10, (64,)))

    prior = AutoregressiveConfig(PixelCNNConfig(width=16, layers=2), Categorical(), ClassLabel()).build(specs, classes=10)
    prior.estimate(data)  # once, before the training
    optimizer, steps = torch.optim.Adam(prior.parameters(), lr=1e-3), 30
    for step in range(steps):
        if step == steps // 8:
            early = copy.deepcopy(prior).eval()
        latents, labels = data[torch.randint(len(data), (16,))]  # a new z ~ q(z|x) each time
        loss = prior(latents, labels, progress=step / steps)["loss"]  # nats per image
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    prior.eval()
    threes = torch.full((8,), 3)
    drawn = prior.sample(torch.arange(8), seed=0, how=Sampling(temperature=0.9, guidance=0.5), contexts=threes)  # [8 7 7]
    prior.guide_by(early)
    clearer = prior.sample(torch.arange(8), seed=0, how=Sampling(autoguidance=0.5), contexts=threes)
    nats = prior.log_prob(drawn, threes)  # 8

- Values of a config outside of the range in its annotation are refused by the command line, but not here.
- `estimate` fits what has no gradient: the scales of latents, frequencies of labels, clusters. Without it, latents are not
  standardized, and labels are drawn equally often.
- `sample` takes the numbers of the samples. Number i under a seed is the same in any batch.
- `render` of stage 1 decodes `drawn`. With `{"learned": prior.log_prob}`, `draws` in its bounds.py gives bounds on log p(x).
- Continuous latents have posteriors {"mean": B C h w, "std": B C h w}, a spec (C, h, w), and the head `GaussianMixture`.
- Several levels take a `CascadeConfig`. `FlowConfig`, `VampConfig` and `SecondVaeConfig` build priors with the same methods.
- completion.py draws the rest of a latent, given a part.
"""
