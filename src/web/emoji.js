/** Emoji for the picker, by group: the sign, then its names. `:name:` in a message becomes the sign. */

const TABLE = `
Smileys
😀 grinning|😃 smiley|😄 smile|😁 grin|😆 laughing|😅 sweat_smile|😂 joy|🤣 rofl|🙂 slight_smile|🙃 upside_down|😉 wink|😊 blush
😇 innocent|🥰 in_love|😍 heart_eyes|😘 kiss|😋 yum|😜 crazy|🤪 zany|🤗 hug|🤭 oops|🤔 thinking|🤨 raised_eyebrow|😐 neutral
😑 expressionless|😶 no_mouth|😏 smirk|🙄 eye_roll|😬 grimace|😌 relieved|😴 sleeping|🤒 sick|🤯 mind_blown|🥳 party|😎 cool|🤓 nerd
😕 confused|😟 worried|😮 open_mouth|😲 astonished|🥺 pleading|😢 cry|😭 sob|😱 scream|😩 weary|😤 huff|😡 rage|🥱 yawn
Gestures
👍 +1 thumbsup|👎 -1 thumbsdown|👌 ok_hand|✌️ victory|🤞 fingers_crossed|🤘 metal|👋 wave|👏 clap|🙌 raised_hands|🙏 pray thanks|💪 muscle|🤝 handshake
👉 point_right|👈 point_left|👆 point_up|👇 point_down|✋ hand|🤷 shrug|🤦 facepalm|🙋 raising_hand|👀 eyes|🧠 brain|🫡 salute|🤟 love_you
Hearts and signs
❤️ heart|🧡 orange_heart|💛 yellow_heart|💚 green_heart|💙 blue_heart|💜 purple_heart|🖤 black_heart|💔 broken_heart|💯 100|💥 boom|✨ sparkles|⭐ star
🔥 fire|🎉 tada|✅ check|❌ x|⚠️ warning|❓ question|❗ exclamation|💤 zzz|💡 bulb|🔔 bell|📌 pin|🚀 rocket
Nature
🐶 dog|🐱 cat|🦊 fox|🐻 bear|🐼 panda|🐸 frog|🐙 octopus|🦀 crab|🐢 turtle|🦋 butterfly|🐝 bee|🦄 unicorn
🌱 seedling|🌲 tree|🌻 sunflower|🍀 clover|🌍 earth|🌙 moon|☀️ sun|⛅ cloudy|🌧️ rain|❄️ snow|🌈 rainbow|🌊 ocean
Food
☕ coffee|🍵 tea|🍺 beer|🍷 wine|🥂 cheers|🍕 pizza|🍔 burger|🍟 fries|🥗 salad|🍜 noodles|🍰 cake|🍪 cookie
🍎 apple|🍌 banana|🍓 strawberry|🍉 watermelon|🥑 avocado|🥕 carrot|🍞 bread|🧀 cheese|🥐 croissant|🍫 chocolate|🍦 ice_cream|🎂 birthday
Things
💻 laptop|📱 phone|⌨️ keyboard|🐛 bug|🔧 wrench|🔨 hammer|⚙️ gear|🔒 lock|🔑 key|📦 package|📎 paperclip|📝 memo
📅 calendar|⏰ alarm|⏳ hourglass|📈 chart_up|📉 chart_down|🎵 music|🎸 guitar|🎮 game|⚽ soccer|🏆 trophy|🎁 gift|🏠 house
🚗 car|🚲 bike|🚂 train|✈️ plane|🗺️ map|🏔️ mountain|🏖️ beach|📷 camera|🔍 search|🗑️ trash|💸 money|🤖 robot`;

/** `[{group, emoji: [{sign, names}]}]` */
export const EMOJI = [];
/** The sign of each name. */
export const EMOJI_BY_NAME = new Map();

for (const line of TABLE.trim().split('\n')) {
  if (!line.includes('|')) {
    EMOJI.push({ group: line, emoji: [] });
    continue;
  }
  for (const entry of line.split('|')) {
    const [sign, ...names] = entry.split(' ');
    EMOJI.at(-1).emoji.push({ sign, names });
    for (const name of names) EMOJI_BY_NAME.set(name, sign);
  }
}
