// Uses a server with OpenAI's clients in JavaScript, and prints what they got as JSON.

import { createOpenAI } from "@ai-sdk/openai";
import { generateImage } from "ai";
import OpenAI, { toFile } from "openai";

const [baseURL, photo, mask] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const settings = { seed: 7, steps: 3 };
const file = (base64) => toFile(Buffer.from(base64, "base64"), "image.png", { type: "image/png" });
const nameOfError = (promise) => promise.then(() => null, (error) => error.constructor.name);

const generated = await client.images.generate({ prompt: "a star", n: 2, size: "64x64", ...settings });
const edited = await client.images.edit({
  image: await file(photo),
  mask: await file(mask),
  prompt: "a star",
  ...settings,
});

const events = [];
for await (const event of await client.images.generate({
  prompt: "a star",
  stream: true,
  partial_images: 2,
  ...settings,
})) {
  events.push(event.type);
}

const models = [];
for await (const model of client.models.list()) models.push(model.id);

const sdk = createOpenAI({ baseURL, apiKey: "none" });
const { images } = await generateImage({
  model: sdk.image("pictogram"),
  prompt: "a star",
  size: "64x64",
  n: 2,
  providerOptions: { openai: { quality: "low" } },
});

const errors = [
  await nameOfError(client.models.retrieve("sdxl")),
  await nameOfError(client.images.generate({ prompt: "a star", n: 0 })),
  await nameOfError(
    client.images.generate({ prompt: "a star", n: 10, steps: 200 }, { signal: AbortSignal.timeout(300) }),
  ),
];

console.log(
  JSON.stringify({
    generated: generated.data.map((image) => image.b64_json),
    edited: edited.data[0].b64_json,
    events,
    models,
    sdk: images.map((image) => image.base64),
    errors,
  }),
);
